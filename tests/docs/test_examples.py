"""Every example runs as a user runs it, and shows what it is there to show."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from blocks import ROOT

EXAMPLES = ROOT / "examples"


def environment(**more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.endswith("_URL")}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return kept | {"PYTHONPATH": path} | more


def run(name: str, folder: Path, **more: str) -> str:
    """Run an example to its end, warnings being errors, and return what it printed."""
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-W", "error", str(EXAMPLES / name)],
        cwd=folder,
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert not list(folder.iterdir()), "it leaves nothing behind"
    return done.stdout


def in_order(text: str, *patterns: str) -> None:
    """Check that lines like these are printed in this order."""
    place = 0
    for pattern in patterns:
        match = re.compile(pattern, re.MULTILINE).search(text, place)
        assert match, f"no {pattern!r} after {text[:place][-200:]!r}"
        place = match.end()


def test_quickstart(tmp_path: Path) -> None:
    """It shows the stack, writes and reads with the tier that answered, health and metrics."""
    in_order(
        run("quickstart.py", tmp_path),
        r"^Metrics\(name='user_state'\)\n  Cached\(\).*\n    Retry\(\)\n      SQLStore",
        r"^ada, newest first: .*0\.9.*0\.8.*0\.7",
        r"^ada .* database +[\d.]+ ms$",
        r"^ada .* in-process cache +[\d.]+ ms$",
        r"^nobody +no such user +database",
        r"^ada +no such user +database",
        r"^history of ada: \[\]$",
        r"^\+ user_state  healthy\n  \+ Cached  healthy",
        r'^layered_store_reads_total\{.*result="hit".*\} 2$',
    )


def test_redis_and_sql(tmp_path: Path, redis_session_url: str) -> None:
    """Two applications agree; with Redis killed everything is served; it is repaired after."""
    in_order(
        run("redis_and_sql.py", tmp_path),
        r"^second +reads ada +\{'warmth': 0\.7\} +Redis",
        r"^second +reads ada +\{'warmth': 0\.7\} +in-process cache",
        r"^second +reads ada +\{'warmth': 0\.9\} +Redis",
        r"^second +reads linus +no such user +database",
        r"killed",
        r"^second +reads ada +\{'warmth': 0\.9\} +database",
        r"^second +reads grace +\{'warmth': 0\.5\} +database",
        r"^~ second  degraded",
        r"^second +reads grace +\{'warmth': 0\.5\} +Redis",
        r"^\+ second  healthy",
    )


def test_redis_and_sql_on_servers_of_the_user(
    tmp_path: Path, redis_url: str, postgres_url: str
) -> None:
    """With REDIS_URL and DATABASE_URL it uses these, and leaves Redis running."""
    printed = run("redis_and_sql.py", tmp_path, REDIS_URL=redis_url, DATABASE_URL=postgres_url)
    in_order(printed, r"postgresql\+asyncpg", r"^second +reads ada .* Redis", r"stays up")


def test_from_attuned(tmp_path: Path) -> None:
    """Inferred states are stored, become the next prompt's context, and are erased."""
    pytest.importorskip("attuned", reason="attuned has no wheel for this Python")
    in_order(
        run("from_attuned.py", tmp_path),
        r"urgency_sensitivity +\d\.\d\d -> \d\.\d\d",
        r"^## Interaction Guidelines",
        r"^Verbosity: ",
        r"^urgency_sensitivity( +\d\.\d\d){5}$",
        r"^None \[\]$",
    )


@pytest.fixture
def application(tmp_path: Path, redis_url: str, postgres_url: str) -> Iterator[str]:
    """The FastAPI example as uvicorn serves it; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(  # noqa: S603
        [
            *(sys.executable, "-m", "uvicorn", "--app-dir", str(EXAMPLES)),
            *("--port", str(port), "--log-level", "warning", "fastapi_app:app"),
        ],
        cwd=tmp_path,
        env=environment(REDIS_URL=redis_url, DATABASE_URL=postgres_url),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        until = time.monotonic() + 30
        while time.monotonic() < until and process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", port), 0.2).close()
                break
            except OSError:
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=20)
    assert process.returncode in (0, -signal.SIGTERM), errors
    assert "Traceback" not in errors, errors


def ask(method: str, url: str, body: object = None) -> tuple[int, str]:
    request = urllib.request.Request(  # noqa: S310
        url,
        method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={"content-type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_fastapi_app(application: str) -> None:
    """States are written, read, listed and erased over HTTP; health and metrics are served."""
    state = f"{application}/users/ada/state"
    assert ask("GET", state)[0] == 404
    assert ask("PUT", state, {"warmth": 0.4})[0] == 204
    assert ask("PUT", state, {"warmth": 0.7})[0] == 204
    assert json.loads(ask("GET", state)[1])["axes"] == {"warmth": 0.7}
    history = json.loads(ask("GET", f"{application}/users/ada/history?limit=5")[1])
    assert [one["axes"]["warmth"] for one in history] == [0.7, 0.4]

    status, text = ask("PUT", state, {"warmth": 7})
    assert status == 400
    assert "from 0 to 1" in text

    status, text = ask("GET", f"{application}/health")
    assert (status, json.loads(text)["status"]) == (200, "healthy")
    metrics = ask("GET", f"{application}/metrics")[1]
    assert re.search(
        r'^layered_store_operations_total\{.*operation="upsert_latest",outcome="ok".*\} 2\.0$',
        metrics,
        re.MULTILINE,
    )
    assert "ada" not in metrics

    assert ask("DELETE", f"{application}/users/ada")[0] == 204
    assert ask("GET", state)[0] == 404
    assert json.loads(ask("GET", f"{application}/users/ada/history")[1]) == []


def test_flask_app(tmp_path: Path, postgres_url: str) -> None:
    """The Flask example serves states, errors, health and metrics from several threads."""
    code = f"""
import sys, threading
sys.path.insert(0, {str(EXAMPLES)!r})
from flask_app import app

def ask(number, seen):
    client = app.test_client()
    state = f"/users/ada-{{number}}/state"
    seen.append(client.get(state).status_code)
    seen.append(client.put(state, json={{"warmth": 0.7}}).status_code)
    seen.append(client.get(state).json["axes"]["warmth"])
    seen.append(client.put(state, json={{"warmth": 7}}).status_code)
    seen.append(client.put(state, json=[]).status_code)
    seen.append(client.delete(f"/users/ada-{{number}}").status_code)
    seen.append(client.get(state).status_code)

results = [[] for _ in range(5)]
threads = [threading.Thread(target=ask, args=each) for each in enumerate(results)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(*results, sep="\\n")
client = app.test_client()
print(client.get("/health").json["status"])
text = client.get("/metrics").text
print("ada-" in text, "layered_store_reads_total" in text)
"""
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        env=environment(DATABASE_URL=postgres_url),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        *["[404, 204, 0.7, 400, 400, 204, 404]"] * 5,
        "healthy",
        "False True",
    ]


def test_an_erasure_that_is_to_be_repeated_is_told_as_such(tmp_path: Path) -> None:
    """503, as for all that may be tried again; the user is erased, a tier is not cleaned yet."""
    code = f"""
import sys
sys.path.insert(0, {str(EXAMPLES)!r})
import fastapi_app, flask_app
from starlette.testclient import TestClient
from layered_store import MemoryStore, SyncStore, WriteThrough
from layered_store.testing import Faults

def stack():
    tier = Faults(MemoryStore())
    tier.outage()
    return WriteThrough(tier, origin=MemoryStore())

with TestClient(fastapi_app.create_app(stack())) as client:
    print(client.delete("/users/ada").status_code)
with SyncStore(stack) as store:
    print(flask_app.create_app(store).test_client().delete("/users/ada").status_code)
"""
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.split() == ["503", "503"], done.stderr


def test_every_example_is_run() -> None:
    """No example is left out here or elsewhere in the tests."""
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    for example in EXAMPLES.rglob("*.py"):
        assert example.stem in tests, example.name
