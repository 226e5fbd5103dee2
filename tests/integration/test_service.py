"""The service as a real process, asked by the published client and by hand."""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from layered_store.errors import CircuitOpenError, ConfigError
from layered_store.service import create_app
from layered_store.snapshot import StateSnapshot
from layered_store.stores.memory import MemoryStore
from layered_store.testing import Scripted

KEY = "a-key-for-tests"


SERVE = (sys.executable, "-m", "layered_store", "serve")
STACK = '[store]\nuse = "memory"\nlayers = [{ use = "cached" }]\n'
SLOW = """
import asyncio, pathlib
from layered_store.stores.memory import MemoryStore

class Slow(MemoryStore):
    async def get_latest(self, user_id):
        pathlib.Path("asked").touch()
        await asyncio.sleep(float(user_id[1:]))
        return await super().get_latest(user_id)

    async def aclose(self):
        pathlib.Path("closed").touch()
        await super().aclose()
"""


class Service:
    """One running process.

    Args:
        tmp_path: its working directory; blocks in a module ``slow`` there are found.
        arguments: of ``serve``.
        key: the API key in its environment.
        stack: the config file that it serves.
        url: the URL of a backend that it serves instead.
    """

    def __init__(
        self,
        tmp_path: Path,
        *arguments: str,
        key: str | None = None,
        stack: str = STACK,
        url: str = "stack.toml",
    ) -> None:
        (tmp_path / "stack.toml").write_text(stack)
        paths = (str(tmp_path), os.environ.get("PYTHONPATH", str(Path(__file__).parents[2])))
        env = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(paths)}
        env.pop("LAYERED_STORE_API_KEY", None)
        if key:
            env["LAYERED_STORE_API_KEY"] = key
        self.process = subprocess.Popen(  # noqa: S603
            [*SERVE, url, "--port", "0", *arguments],
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        self.lines: list[str] = []
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"running on (http://\S+)", line):
                self.url = found[1]
                return
        raise AssertionError(f"exit {self.process.wait(20)}: {''.join(self.lines)}")

    def stop(self) -> tuple[int, str]:
        """Ask it to end; return its exit code and what it wrote."""
        self.process.send_signal(signal.SIGTERM)
        out, err = self.process.communicate(timeout=20)
        return self.process.returncode, "".join(self.lines) + out + err


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    running = Service(tmp_path, "--max-body", "5000", key=KEY)
    yield running
    running.process.kill()
    running.process.communicate()


def test_published_client(service: Service) -> None:
    """The ``attuned`` client stores, reads, deletes and asks for health, unchanged."""
    attuned = pytest.importorskip("attuned")
    client = attuned.AttunedClient(service.url, api_key=KEY)
    snapshot = attuned.StateSnapshot.builder().user_id("u-1").axis("warmth", 0.7).build()
    assert client.health()
    assert client.get_state("u-1") is None
    client.upsert_state(snapshot)
    found = client.get_state("u-1")
    assert found.user_id == "u-1"
    # The client itself keeps single precision.
    assert found.get_axis("warmth") == pytest.approx(0.7)
    assert found.updated_at_unix_ms == snapshot.updated_at_unix_ms
    assert client.delete_state("u-1")
    assert client.get_state("u-1") is None
    with pytest.raises(RuntimeError):
        attuned.AttunedClient(service.url, api_key="wrong").get_state("u-1")


def test_a_url_is_served_with_metrics_and_without_a_cache(tmp_path: Path) -> None:
    """Its calls are counted; what another process writes to the backend shows at once."""
    running = Service(tmp_path, url="sqlite+aiosqlite:///states.db")
    assert "no metrics" not in "".join(running.lines)
    with httpx.Client(base_url=running.url) as client:
        body = StateSnapshot("u-1", axes={"warmth": 0.5}).to_json()
        assert client.post("/v1/state", content=body).status_code == 204
        assert client.get("/v1/state/u-1").status_code == 200
        assert client.get("/ready").status_code == 200
        done = subprocess.run(  # noqa: S603
            [*SERVE[:3], "put", "sqlite+aiosqlite:///states.db", "u-1", "warmth=1"],
            cwd=tmp_path,
            check=False,
        )
        assert done.returncode == 0
        assert client.get("/v1/state/u-1").json()["axes"] == {"warmth": 1}
        text = client.get("/metrics").text
    for line in (
        'operations_total{operation="upsert_latest",outcome="ok",stack="default"} 1.0',
        'operations_total{operation="get_latest",outcome="ok",stack="default"} 2.0',
        'health_status{layer="1.sql",stack="default"} 2.0',
    ):
        assert f"layered_store_{line}\n" in text
    assert running.stop()[0] == 0


def test_a_config_file_without_metrics_is_served_as_it_is_and_told_of(tmp_path: Path) -> None:
    """One line at the start; none when the file has them."""
    running = Service(tmp_path)
    assert "layered_store_" not in httpx.get(f"{running.url}/metrics").text
    assert running.stop()[1].count("this stack has no metrics") == 1
    counted = STACK.replace("[{", '[{ use = "metrics", name = "users" }, {')
    assert "no metrics" not in Service(tmp_path, stack=counted).stop()[1]


def test_graceful_end_and_silent_logs(service: Service) -> None:
    """SIGTERM ends it cleanly; no user id, state or key stands in what it wrote."""
    marked = "marked-user-4711"
    with httpx.Client(base_url=service.url, headers={"Authorization": f"Bearer {KEY}"}) as client:
        body = StateSnapshot(marked, axes={"marked_axis": 0.123456}).to_json()
        assert client.post("/v1/state", content=body).status_code == 204
        assert client.get(f"/v1/state/{marked}").status_code == 200
        client.post("/v1/state", content=body[:-5])
    code, text = service.stop()
    assert code == 0
    assert "Traceback" not in text
    for secret in (marked, "marked_axis", "0.123456", KEY):
        assert secret not in text


def test_body_limit_without_a_length(service: Service) -> None:
    """A body whose length is not told is cut off at the limit too."""

    def endless() -> Iterator[bytes]:
        for _ in range(100):
            yield b"x" * 1000

    headers = {"Authorization": f"Bearer {KEY}"}
    answer = httpx.post(f"{service.url}/v1/state", content=endless(), headers=headers)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "PAYLOAD_TOO_LARGE"


@pytest.fixture
def slow(tmp_path: Path) -> str:
    """A stack whose user ``s2.5`` takes that many seconds."""
    (tmp_path / "slow.py").write_text(SLOW)
    info = tmp_path / "slow-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: slow\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[layered_store.blocks]\nslow = slow:Slow\n")
    return '[store]\nuse = "slow"\n'


def _ask(url: str, answers: list[httpx.Response]) -> Thread:
    thread = Thread(target=lambda: answers.append(httpx.get(url, timeout=30)))
    thread.start()
    return thread


def _wait_for(path: Path) -> None:
    until = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_the_end_waits_for_running_requests(tmp_path: Path, slow: str) -> None:
    """SIGTERM during a slow request: it is answered whole, then the stack is closed, exit 0."""
    running = Service(tmp_path, stack=slow)
    answers: list[httpx.Response] = []
    asking = _ask(f"{running.url}/v1/state/s1", answers)
    _wait_for(tmp_path / "asked")
    code, text = running.stop()
    asking.join()
    assert [answer.json()["error"]["code"] for answer in answers] == ["USER_NOT_FOUND"]
    assert (tmp_path / "closed").exists()
    assert code == 0
    assert "Traceback" not in text
    with pytest.raises(httpx.ConnectError):
        httpx.get(running.url)


def test_the_end_is_bounded(tmp_path: Path, slow: str) -> None:
    """A request that outlives the drain is told so; the process ends without a traceback."""
    running = Service(tmp_path, "--drain", "1", stack=slow)
    answers: list[httpx.Response] = []
    asking = _ask(f"{running.url}/v1/state/s60", answers)
    _wait_for(tmp_path / "asked")
    began = time.monotonic()
    code, text = running.stop()
    asking.join()
    assert time.monotonic() - began < 10
    assert [answer.status_code for answer in answers] == [503]
    assert answers[0].json()["error"]["code"] == "UNAVAILABLE"
    assert answers[0].json()["error"]["request_id"] == answers[0].headers["x-request-id"]
    assert (tmp_path / "closed").exists()
    assert code == 0
    assert "Traceback" not in text


def _raw(url: str, data: bytes) -> socket.socket:
    host, _, port = url.removeprefix("http://").partition(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    connection.sendall(data)
    return connection


def _all(connection: socket.socket) -> bytes:
    received = b""
    try:
        while more := connection.recv(65536):
            received += more
    except ConnectionResetError:
        pass
    connection.close()
    return received


def test_callers_that_never_finish(tmp_path: Path) -> None:
    """Requests that stop half-way are closed in time, and nobody else waits for them."""
    running = Service(tmp_path, "--patience", "1")
    try:
        heads = [_raw(running.url, b"GET /live HTTP/1.1\r\nHost") for _ in range(20)]
        post = b"POST /v1/state HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
        bodies = [_raw(running.url, post) for _ in range(20)]
        with httpx.Client(base_url=running.url) as client:
            assert client.get("/live").status_code == 200
            assert [_all(head) for head in heads] == [b""] * 20
            answers = [_all(body) for body in bodies]
            assert all(answer.startswith(b"HTTP/1.1 408") for answer in answers)
            assert all(b"REQUEST_TIMEOUT" in answer for answer in answers)
            # A connection on which one request was answered already.
            assert client.get("/live").status_code == 200
    finally:
        code, text = running.stop()
    assert code == 0
    assert "Traceback" not in text


@pytest.mark.parametrize(
    "request_",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET /live HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 1_000_000 + b"\r\n\r\n",
        b"GET /v1/state/\xc3\xbc HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /v1/state HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"GET /live HTTP/1.1\r\nHost: x\r\nX-Request-ID: a\x00b\r\n\r\n",
    ],
    ids=range(5),
)
def test_what_is_no_http(shared: Service, request_: bytes) -> None:
    """A malformed request is a 400 in the one shape of errors."""
    head, _, body = _all(_raw(shared.url, request_)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    error = json.loads(body)["error"]
    assert error["code"] == "VALIDATION_ERROR"
    assert f"x-request-id: {error['request_id']}".encode() in head


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    running = Service(tmp_path_factory.mktemp("shared"))
    yield running
    code, text = running.stop()
    assert code == 0
    assert "Traceback" not in text


def test_user_ids_of_all_scripts(shared: Service) -> None:
    """An id in the path is percent-encoded UTF-8 and comes back as it was."""
    with httpx.Client(base_url=shared.url) as client:
        for user in ("Grüße", "日本-1", "अमर", "Ⅷ_٣", "a" * 256, "history"):
            path = f"/v1/state/{quote(user)}"
            assert client.post("/v1/state", json={"user_id": user}).status_code == 204
            assert client.get(path).json()["user_id"] == user
            assert [each["user_id"] for each in client.get(f"{path}/history").json()] == [user]
            assert client.delete(path).status_code == 204
            assert client.get(path).status_code == 404


def test_body_that_goes_away(shared: Service) -> None:
    """A caller that leaves in the middle of its body is no error of the service."""
    _raw(
        shared.url,
        b"POST /v1/state HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{",
    ).close()
    assert httpx.get(f"{shared.url}/live").status_code == 200


def _failed(tmp_path: Path, *arguments: str, stack: str = STACK) -> str:
    with pytest.raises(AssertionError) as caught:
        Service(tmp_path, *arguments, stack=stack)
    text = str(caught.value)
    assert "Traceback" not in text
    return text


def test_starts_without_its_backend(tmp_path: Path) -> None:
    """The service waits for a backend that is down: live, not ready, and it says so."""
    running = Service(
        tmp_path, stack='[store]\nuse = "redis"\nurl = "redis://:secret-pw@127.0.0.1:1/0"\n'
    )
    with httpx.Client(base_url=running.url) as client:
        assert client.get("/live").status_code == 200
        assert client.get("/ready").status_code == 503
        assert client.get("/v1/state/u-1").json()["error"]["code"] == "UNAVAILABLE"
    code, text = running.stop()
    assert code == 0
    assert "starting without its backend" in text
    assert "secret-pw" not in text


def test_failed_starts_are_one_line(tmp_path: Path, shared: Service) -> None:
    """What keeps the service from starting is told without a traceback; the exit code is 1 or 2."""
    port = shared.url.rpartition(":")[2]
    text = _failed(tmp_path, "--port", port)
    assert "address already in use" in text
    assert text.startswith("exit 1:")
    assert "did you mean 'memory'" in _failed(tmp_path, stack='[store]\nuse = "memry"\n')
    assert "API key file" in _failed(tmp_path, "--api-key-file", "nothing")
    (tmp_path / "broken.db").write_text("this is no database" * 100)
    text = _failed(
        tmp_path, stack='[store]\nuse = "sql"\nurl = "sqlite+aiosqlite:///broken.db"\n'
    )
    assert "SQLStore" in text


# The application itself, without a process.


def _client(stack: Any, **options: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(create_app(stack, **options))
    return httpx.AsyncClient(transport=transport, base_url="http://test")


@pytest.mark.parametrize("answer", [StateSnapshot("u-2"), {"user_id": "u-2"}, "u-1"])
async def test_what_is_not_the_users_state_never_leaves(answer: Any) -> None:
    """A store from elsewhere may mix up its users; nobody on the network sees it."""

    class Mixed(MemoryStore):
        async def get_latest(self, user_id: str) -> Any:
            return answer

        async def get_history(self, user_id: str, limit: int) -> Any:
            return [answer]

    async with _client(Mixed()) as client:
        for path in ("/v1/state/u-1", "/v1/state/u-1/history"):
            response = await client.get(path)
            assert (response.status_code, response.json()["error"]["code"]) == (500, "STORE_ERROR")


class Scored(StateSnapshot):
    """A class with a field that may hold what JSON has no form for."""

    score: float = 0.0


async def test_a_state_that_json_cannot_hold() -> None:
    """No fault of the request: 400 would say so."""
    stack = MemoryStore(snapshot_type=Scored)
    await stack.upsert_latest(Scored("u-1", score=math.nan))
    async with _client(stack) as client:
        for path in ("/v1/state/u-1", "/v1/state/u-1/history"):
            response = await client.get(path)
            assert (response.status_code, response.json()["error"]["code"]) == (500, "STORE_ERROR")


@pytest.mark.parametrize(
    ("seconds", "header"), [(0.0, "1"), (1.0, "1"), (2.2, "3"), (math.inf, "86400")]
)
async def test_retry_after_is_never_too_early(seconds: float, header: str) -> None:
    """Whole seconds, rounded up: a caller that comes back earlier is refused again."""
    stack = Scripted(CircuitOpenError(retry_after=seconds))
    async with _client(stack) as client:
        response = await client.get("/v1/state/u-1")
    assert (response.status_code, response.headers["retry-after"]) == (503, header)


async def test_routes() -> None:
    """Each route answers as documented."""
    first, second = StateSnapshot("u-1", axes={"a": 0.1}), StateSnapshot("u-1", axes={"a": 0.2})
    async with _client(MemoryStore()) as client:
        for snapshot in (first, second):
            assert (await client.post("/v1/state", content=snapshot.to_json())).status_code == 204
        found = await client.get("/v1/state/u-1")
        assert StateSnapshot.from_json(found.content) == second
        assert found.headers["content-type"] == "application/json"
        assert found.headers["cache-control"] == "no-store"
        history = (await client.get("/v1/state/u-1/history", params={"limit": 1})).json()
        assert [state["axes"] for state in history] == [{"a": 0.2}]
        assert len((await client.get("/v1/state/u-1/history")).json()) == 2
        assert (await client.delete("/v1/state/u-1")).status_code == 204
        assert (await client.delete("/v1/state/u-1")).status_code == 204
        assert (await client.get("/v1/state/u-1")).status_code == 404
        assert (await client.get("/v1/state/u-1/history")).json() == []
        assert (await client.get("/health")).json()["status"] == "healthy"
        assert (await client.get("/live")).status_code == 200
        assert (await client.get("/ready")).status_code == 200
        assert (await client.get("/metrics")).status_code == 200
        assert "/v1/state" in (await client.get("/openapi.json")).json()["paths"]


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "code"),
    [
        ("POST", "/v1/state", b"{", 400, "VALIDATION_ERROR"),
        ("POST", "/v1/state", b"", 400, "VALIDATION_ERROR"),
        ("POST", "/v1/state", b'{"user_id":"a b"}', 400, "VALIDATION_ERROR"),
        ("POST", "/v1/state", b'{"user_id":"u","confidence":2}', 400, "VALIDATION_ERROR"),
        ("POST", "/v1/state", b"[" * 60_000, 400, "VALIDATION_ERROR"),
        ("POST", "/v1/state", b"x" * 70_000, 413, "PAYLOAD_TOO_LARGE"),
        ("GET", "/v1/state/u-1", b"", 404, "USER_NOT_FOUND"),
        ("GET", "/v1/state/a%20b", b"", 400, "VALIDATION_ERROR"),
        ("GET", "/v1/state/%ff", b"", 400, "VALIDATION_ERROR"),
        ("GET", "/v1/state/u/history?limit=-1", b"", 400, "VALIDATION_ERROR"),
        ("GET", "/v1/state/u/history?limit=1e3", b"", 400, "VALIDATION_ERROR"),
        ("GET", "/v1/state/u/history?limit=99999999999999999999", b"", 400, "VALIDATION_ERROR"),
        ("GET", "/v1/state/u/history?limit=", b"", 400, "VALIDATION_ERROR"),
        ("GET", "/v1/state/a%2Fb", b"", 400, "VALIDATION_ERROR"),
        # The id is "u/history", and not the history of u.
        ("GET", "/v1/state/u%2Fhistory", b"", 400, "VALIDATION_ERROR"),
        ("DELETE", "/v1/state/u%2fhistory", b"", 400, "VALIDATION_ERROR"),
        ("GET", "/v1/state%2Fu", b"", 400, "VALIDATION_ERROR"),
        ("GET", "/v1/state/%00", b"", 400, "VALIDATION_ERROR"),
        ("GET", "/v1/state/u/history?limit=%D9%A1", b"", 400, "VALIDATION_ERROR"),
        ("GET", "/v1/state/u/history?limit=1001", b"", 400, "VALIDATION_ERROR"),
        ("GET", "/v1/state/u/history?limit=1.5", b"", 400, "VALIDATION_ERROR"),
        ("GET", "/v1/state/u/history?limit=NaN", b"", 400, "VALIDATION_ERROR"),
        ("GET", "/v1/state/a%20b/history", b"", 400, "VALIDATION_ERROR"),
        ("DELETE", "/v1/state/a%20b", b"", 400, "VALIDATION_ERROR"),
        ("POST", "/v1/state", b'{"user_id":"\xff"}', 400, "VALIDATION_ERROR"),
        ("POST", "/v1/state", b'{"user_id":"\\ud800"}', 400, "VALIDATION_ERROR"),
        ("POST", "/v1/state", b'{"user_id":"u","confidence":NaN}', 400, "VALIDATION_ERROR"),
        ("POST", "/v1/state", b'{"user_id":"u","confidence":1e999}', 400, "VALIDATION_ERROR"),
        ("POST", "/v1/state", b'{"user_id":"u","confidence":true}', 400, "VALIDATION_ERROR"),
        ("POST", "/v1/state", b'{"user_id":"u","axes":{"a":null}}', 400, "VALIDATION_ERROR"),
        ("POST", "/v1/state", b'{"user_id":"u","axes":{"A":0.5}}', 400, "VALIDATION_ERROR"),
        ("POST", "/v1/state", b'{"user_id":"u","source":"x"}', 400, "VALIDATION_ERROR"),
        (
            "POST",
            "/v1/state",
            b'{"user_id":"u","updated_at_unix_ms":9999999999999999999999}',
            400,
            "VALIDATION_ERROR",
        ),
        ("GET", "/v1/state/", b"", 404, "NOT_FOUND"),
        ("GET", "/v1/state/u/", b"", 404, "NOT_FOUND"),
        ("GET", "/v1/state/u/other", b"", 404, "NOT_FOUND"),
        ("OPTIONS", "/v1/state/u", b"", 405, "METHOD_NOT_ALLOWED"),
        ("GET", "/nowhere", b"", 404, "NOT_FOUND"),
        ("PUT", "/v1/state", b"", 405, "METHOD_NOT_ALLOWED"),
    ],
)
async def test_errors(method: str, path: str, content: bytes, status: int, code: str) -> None:
    """Every error has the one shape, its code, and the request id of the header."""
    async with _client(MemoryStore()) as client:
        answer = await client.request(
            method, path, content=content, headers={"X-Request-ID": "req-7"}
        )
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"code", "message", "request_id"}
    assert (error["code"], error["request_id"]) == (code, "req-7")
    assert answer.headers["x-request-id"] == "req-7"
    # Which block noticed is none of a caller's business, who cannot see the stack.
    assert status != 400 or "MemoryStore" not in answer.text


async def test_a_deeply_nested_field_that_nobody_knows_is_left_out_or_refused() -> None:
    """How deep is too deep differs between versions of Python; none of them fails."""
    content = b'{"user_id":"u","x":' + b"[" * 30_000 + b"]" * 30_000 + b"}"
    async with _client(MemoryStore()) as client:
        answer = await client.post("/v1/state", content=content)
        if answer.status_code == 204:
            assert (await client.get("/v1/state/u")).json()["user_id"] == "u"
        else:
            assert answer.status_code == 400
            assert answer.json()["error"]["code"] == "VALIDATION_ERROR"


async def test_what_a_route_takes() -> None:
    """A refused method is answered with all that the path takes."""
    async with _client(MemoryStore()) as client:
        answer = await client.put("/v1/state/u-1")
    assert answer.status_code == 405
    assert set(answer.headers["allow"].split(", ")) == {"GET", "HEAD", "DELETE"}


class Broken(MemoryStore):
    """Fails as it is told."""

    error: Exception

    async def get_latest(self, user_id: str) -> StateSnapshot | None:  # noqa: ARG002
        raise self.error

    async def health_check(self) -> bool:
        return False


def _broken(error: Exception) -> Broken:
    store = Broken()
    store.error = error
    return store


async def test_store_errors() -> None:
    """Unavailable and refused are 503 with a time to wait; the rest is 500 and tells no text."""
    from layered_store.errors import (
        CircuitOpenError,
        CorruptDataError,
        OverloadedError,
        StoreTimeoutError,
        UnavailableError,
    )

    for error, status, code in (
        (UnavailableError("down"), 503, "UNAVAILABLE"),
        (StoreTimeoutError("slow"), 503, "UNAVAILABLE"),
        (CircuitOpenError(retry_after=7.0), 503, "UNAVAILABLE"),
        (OverloadedError("full"), 503, "UNAVAILABLE"),
        (CorruptDataError("bad"), 500, "STORE_ERROR"),
        (RuntimeError("secret-in-a-bug"), 500, "STORE_ERROR"),
    ):
        async with _client(_broken(error)) as client:
            answer = await client.get("/v1/state/u-1")
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        assert "secret-in-a-bug" not in answer.text
        if isinstance(error, CircuitOpenError):
            assert answer.headers["retry-after"] == "7"


async def test_no_more_than_so_many_at_a_time() -> None:
    """Requests beyond the bound are refused at once, and places come free again.

    Probes and scrapes of the metrics are let in: an overload is seen while it lasts.
    """
    gate = asyncio.Event()

    class Waiting(MemoryStore):
        async def get_latest(self, user_id: str) -> StateSnapshot | None:
            await gate.wait()
            return None

    async with _client(Waiting(), max_in_flight=2) as client:
        first = [asyncio.create_task(client.get("/v1/state/u-1")) for _ in range(2)]
        await asyncio.sleep(0.05)
        refused = await client.get("/v1/state/u-1")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "UNAVAILABLE")
        assert refused.headers["retry-after"] == "1"
        for path in ("/live", "/ready", "/health", "/metrics"):
            assert (await client.get(path)).status_code == 200
        gate.set()
        assert [answer.status_code for answer in await asyncio.gather(*first)] == [404, 404]
        assert (await client.get("/v1/state/u-1")).status_code == 404


@pytest.mark.parametrize(
    "options",
    [
        {"max_body": 0},
        {"max_in_flight": 0},
        {"body_seconds": 0},
        {"api_key": ""},
        {"api_key": " a"},
        {"api_key": "two\nlines"},
        {"api_key": "\udcff"},
        {"api_key": 5},
    ],
)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    """An option out of its range is refused by name; so is a key that would protect nothing."""
    with pytest.raises(ConfigError, match=rf"create_app\.{next(iter(options))}"):
        create_app(MemoryStore(), **options)


async def test_unhealthy() -> None:
    """An unhealthy store is 503 for /health and /ready; the process is live all the same."""
    async with _client(_broken(RuntimeError())) as client:
        assert (await client.get("/health")).status_code == 503
        assert (await client.get("/ready")).status_code == 503
        assert (await client.get("/live")).status_code == 200


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401),
        ("Bearer wrong", 401),
        (f"Basic {KEY}", 401),
        ("Bearer", 401),
        (f"bearer {KEY}", 404),
        (f"Bearer {KEY}", 404),
    ],
)
async def test_key(header: str | None, status: int) -> None:
    """States and metrics need the key; probes do not."""
    headers = {} if header is None else {"Authorization": header}
    async with _client(MemoryStore(), api_key=KEY) as client:
        assert (await client.get("/v1/state/u-1", headers=headers)).status_code == status
        assert (await client.get("/metrics", headers=headers)).status_code in (status, 200)
        for path in ("/live", "/ready", "/health"):
            assert (await client.get(path)).status_code == 200


async def test_mounted_in_another_application() -> None:
    """The application works below a path of a user's own, key included."""
    from starlette.applications import Starlette
    from starlette.routing import Mount

    app = Starlette(routes=[Mount("/states", create_app(MemoryStore(), api_key=KEY))])
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://test"
    ) as client:
        assert (await client.get("/states/live")).status_code == 200
        assert (await client.get("/states/v1/state/u-1")).status_code == 401
        headers = {"Authorization": f"Bearer {KEY}"}
        assert (await client.get("/states/v1/state/u-1", headers=headers)).status_code == 404
        document = (await client.get("/states/openapi.json")).json()
        assert document["servers"] == [{"url": "/states"}]
    async with _client(MemoryStore()) as client:
        assert "servers" not in (await client.get("/openapi.json")).json()


def test_refuses_a_public_address_without_a_key(tmp_path: Path) -> None:
    """A public address needs a key, unless it is said by name that none is wanted."""
    arguments = [sys.executable, "-m", "layered_store", "serve", "--host", "0.0.0.0"]  # noqa: S104
    env = {k: v for k, v in os.environ.items() if k != "LAYERED_STORE_API_KEY"}
    done = subprocess.run(  # noqa: S603
        arguments, capture_output=True, text=True, timeout=20, check=False, cwd=tmp_path, env=env
    )
    assert done.returncode == 2
    assert "--public-without-key" in done.stderr


def test_fuzz() -> None:
    """Whatever is asked, allowed by the OpenAPI document or not: never a 500, and what is answered
    is what the document says."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, given, settings
    from hypothesis.errors import Unsatisfiable
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_headers_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    checks = [
        not_a_server_error,
        status_code_conformance,
        content_type_conformance,
        response_headers_conformance,
        response_schema_conformance,
    ]
    schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(MemoryStore()))
    statuses: dict[str, set[int]] = {}

    def ask(case: Any) -> None:
        answer = case.call()
        assert "Traceback" not in answer.text
        case.validate_response(answer, checks=checks)
        statuses.setdefault(case.operation.label, set()).add(answer.status_code)

    few = settings(
        max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    for operation in schema.get_all_operations():
        for mode in schemathesis.GenerationMode:
            cases = operation.ok().as_strategy(generation_mode=mode)
            try:
                few(given(case=cases)(ask))()
            except Unsatisfiable:
                continue  # nothing about this operation can be wrong
    assert statuses["POST /v1/state"] >= {204, 400}
    assert statuses["GET /v1/state/{user_id}/history"] >= {200, 400}
    assert statuses["DELETE /v1/state/{user_id}"] >= {204, 400}
    assert len(statuses) >= 7
