"""The command line on real files, as processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from layered_store.snapshot import StateSnapshot
from layered_store.stores.sql import SQLStore

pytest.importorskip("aiosqlite")


def run(*arguments: str, cwd: Path, code: int = 0) -> str:
    """Return what the command prints."""
    return ended(*arguments, cwd=cwd, code=code).stdout


def told(*arguments: str, cwd: Path, code: int = 0) -> str:
    """Return what the command says beside its output."""
    return ended(*arguments, cwd=cwd, code=code).stderr


def ended(*arguments: str, cwd: Path, code: int) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-m", "layered_store", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def fill(path: Path, users: int, states: int) -> None:
    async def work() -> None:
        async with SQLStore(f"sqlite+aiosqlite:///{path}") as store:
            for state in range(states):
                await store.upsert_latest_many(
                    StateSnapshot(f"u-{user}", axes={"a": state / 100}) for user in range(users)
                )

    asyncio.run(work())


async def read(path: Path, users: int) -> list[list[StateSnapshot]]:
    async with SQLStore(f"sqlite+aiosqlite:///{path}") as store:
        return [await store.get_history(f"u-{user}", 99) for user in range(users)]


def test_one_user(tmp_path: Path) -> None:
    """What is put is there for the next process, until it is erased."""
    url = "sqlite+aiosqlite:///states.db"
    run("put", url, "u-1", "warmth=0.5", "energy=0.25", cwd=tmp_path)
    run("put", url, "u-1", "--axis", "warmth=0.7", "--source", "mixed", cwd=tmp_path)
    assert json.loads(run("get", url, "u-1", cwd=tmp_path))["axes"] == {"warmth": 0.7}
    assert "warmth=0.7" in run("history", url, "u-1", cwd=tmp_path)
    assert len(json.loads(run("history", url, "u-1", "--json", cwd=tmp_path))) == 2
    exported = json.loads(run("export", url, "u-1", cwd=tmp_path))
    assert (exported["latest"]["source"], len(exported["history"])) == ("mixed", 2)
    run("erase", url, "u-1", cwd=tmp_path)  # a script is not asked
    run("get", url, "u-1", cwd=tmp_path, code=1)
    assert run("history", url, "u-1", cwd=tmp_path) == ""
    assert told("history", url, "u-1", cwd=tmp_path) == "there is no state of this user\n"
    assert "SQLStore healthy" in run("check", url, cwd=tmp_path)


def test_export_everything(tmp_path: Path) -> None:
    """``export --all`` gives one line for each user."""
    fill(tmp_path / "a.db", 30, 2)
    lines = run("export", "sqlite+aiosqlite:///a.db", "--all", cwd=tmp_path).splitlines()
    records = [json.loads(line) for line in lines]
    assert {record["user_id"] for record in records} == {f"u-{user}" for user in range(30)}
    assert all(len(record["history"]) == 2 for record in records)


def test_copy(tmp_path: Path) -> None:
    """``copy`` moves users with histories, counts both sides, and repeated writes nothing."""
    fill(tmp_path / "a.db", 50, 3)
    pair = ("sqlite+aiosqlite:///a.db", "sqlite+aiosqlite:///b.db")
    result = json.loads(run("copy", *pair, "--json", "--page", "20", cwd=tmp_path))
    assert result == {
        "users": 50,
        "states": 150,
        "conflicts": 0,
        "erased": 0,
        "unreadable": 0,
        "users_in_source": 50,
        "users_in_target": 50,
    }
    assert asyncio.run(read(tmp_path / "a.db", 50)) == asyncio.run(read(tmp_path / "b.db", 50))
    assert json.loads(run("copy", *pair, "--json", cwd=tmp_path))["states"] == 0


def test_records_that_cannot_be_read(tmp_path: Path) -> None:
    """They are left out and told of; nobody else is missing from an export or a copy."""
    fill(tmp_path / "a.db", 4, 2)
    with sqlite3.connect(tmp_path / "a.db") as damaged:
        # One user's latest state and another's first one.
        damaged.execute(
            "UPDATE layered_store_history SET payload = x'ff' WHERE position IN "
            "(SELECT max(position) FROM layered_store_history UNION "
            "SELECT min(position) FROM layered_store_history)"
        )
    damaged.close()
    pair = ("sqlite+aiosqlite:///a.db", "sqlite+aiosqlite:///b.db")
    whole = run("export", pair[0], "--all", cwd=tmp_path, code=1).splitlines()
    result = json.loads(run("copy", *pair, "--json", cwd=tmp_path, code=1))
    assert (result["users"], result["states"], result["unreadable"]) == (4, 4, 2)
    assert (result["users_in_source"], result["users_in_target"]) == (4, 2)
    assert len(whole) == 2
    assert set(run("export", pair[1], "--all", cwd=tmp_path).splitlines()) == set(whole)


def test_copy_goes_on_after_kills(tmp_path: Path) -> None:
    """A copy that is killed again and again goes on where it was; nobody erased comes back.

    In the end both sides are equal, and nothing is left of what it kept.
    """
    fill(tmp_path / "a.db", 400, 2)
    pair = ("sqlite+aiosqlite:///a.db", "sqlite+aiosqlite:///b.db")
    state = tmp_path / ".layered-store-copy.json"
    reached, erased = 0, []
    for turn in range(3):
        killed = subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", "layered_store", "copy", *pair, "--page", "5"],
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until = time.monotonic() + 60
        while reached_by(state) <= reached and killed.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.002)
        killed.kill()
        killed.wait()
        assert reached_by(state) > reached
        reached = reached_by(state)
        # Who was copied by now, and who is still to come.
        for user in (copied(tmp_path / "b.db")[turn], f"u-{399 - turn}"):
            run("erase", pair[0], user, "--yes", cwd=tmp_path)
            erased.append(user)
    result = json.loads(run("copy", *pair, "--json", cwd=tmp_path))
    left = 400 - len(set(erased))
    assert (result["users_in_source"], result["users_in_target"]) == (left, left)
    assert result["conflicts"] == 0
    assert [path.name for path in tmp_path.iterdir() if "copy" in path.name] == []
    assert asyncio.run(read(tmp_path / "a.db", 400)) == asyncio.run(read(tmp_path / "b.db", 400))


def reached_by(state: Path) -> int:
    try:
        return int(json.loads(state.read_text())["reached"]["users"])
    except FileNotFoundError:
        return 0


def copied(path: Path) -> list[str]:
    async def work() -> list[str]:
        async with SQLStore(f"sqlite+aiosqlite:///{path}") as store:
            return list((await store.users("", 1000)).user_ids)

    return asyncio.run(work())


def test_copy_to_a_place_that_is_not_there(tmp_path: Path) -> None:
    """A copy that could not begin leaves nothing that keeps the right one from beginning."""
    fill(tmp_path / "a.db", 3, 1)
    source = "sqlite+aiosqlite:///a.db"
    run("copy", source, "redis://127.0.0.1:1/0", cwd=tmp_path, code=1)
    run("copy", source, "no-such.toml", cwd=tmp_path, code=2)
    (tmp_path / "states.py").write_text(
        "from layered_store import StateSnapshot\nclass Member(StateSnapshot):\n    plan: str = '-'"
    )
    (tmp_path / "other.toml").write_text(
        "[store]\nuse = 'memory'\nsnapshot_type = 'states:Member'\n"
    )
    run("copy", source, "other.toml", cwd=tmp_path, code=2)
    run("copy", source, "sqlite+aiosqlite:///b.db", cwd=tmp_path)
    assert not list(tmp_path.glob(".layered-store-copy*"))


def test_a_class_of_the_project_is_found(tmp_path: Path) -> None:
    """It stands beside the config file; the installed command begins in another directory."""
    script = tmp_path / "bin" / "layered-store"
    script.parent.mkdir()
    script.write_text("from layered_store.cli import main\nmain()\n")
    (tmp_path / "states.py").write_text(
        "from layered_store import StateSnapshot\nclass Member(StateSnapshot):\n    plan: str = '-'"
    )
    # What is installed comes first, whatever stands in the working directory.
    (tmp_path / "click.py").write_text("raise SystemExit('the wrong one')\n")
    (tmp_path / "stack.toml").write_text(
        "[store]\nuse = 'memory'\nsnapshot_type = 'states:Member'\n"
    )
    shown = subprocess.run(  # noqa: S603
        [sys.executable, str(script), "show", "stack.toml"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=tmp_path,
    )
    assert shown.stdout == "MemoryStore(snapshot_type=Member)\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("get", "sqlite:///a.bd", "u-1"),
        ("history", "sqlite+aiosqlite:///a.bd", "u-1"),
        ("erase", "sqlite:///a.bd", "u-1", "--yes"),
        ("export", "sqlite:///a.bd", "--all"),
        ("check", "sqlite:///a.bd?timeout=1"),
        ("copy", "sqlite:///a.bd", "sqlite:///b.db"),
    ],
)
def test_a_mistyped_file_is_not_made(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """It would be an empty database, in which nobody has a state."""
    assert "there is no such SQLite file" in told(*arguments, cwd=tmp_path, code=2)
    assert not list(tmp_path.iterdir())


def test_a_copy_of_nobody_is_told(tmp_path: Path) -> None:
    """The wrong file, empty, would look like a copy that went well."""
    (tmp_path / "a.db").touch()
    stderr = told("copy", "sqlite:///a.db", "sqlite:///b.db", cwd=tmp_path)
    assert "warning: FROM has no users" in stderr


def test_copy_of_something_else(tmp_path: Path) -> None:
    """The place kept of one copy is not taken for that of another."""
    (tmp_path / ".layered-store-copy.json").write_text('{"pair": "x"}')
    stderr = told("copy", "sqlite:///a.db", "sqlite:///b.db", cwd=tmp_path, code=1)
    assert "belongs to another copy" in stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(tmp_path: Path, number: int) -> None:
    """Ctrl-C is one line and exit 130; ``bench`` still erases its users and shows its figures, also
    when it is told to end.
    """
    url = "sqlite+aiosqlite:///a.db"
    bench = subprocess.Popen(  # noqa: S603
        [sys.executable, "-m", "layered_store", "bench", url, "--seconds", "60", "--users", "50"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs this in the background has it ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    )
    until = time.monotonic() + 30
    while not (tmp_path / "a.db").exists():
        assert time.monotonic() < until
        time.sleep(0.01)
    time.sleep(1.5)
    bench.send_signal(number)
    out, err = bench.communicate(timeout=30)
    assert bench.returncode == 130
    assert "Traceback" not in err
    assert "interrupted" in err
    assert "get_latest" in out
    assert run("export", url, "--all", cwd=tmp_path) == ""


def test_started_without_any_stream(tmp_path: Path) -> None:
    """Schedulers start jobs with their streams closed: an erasure is done, an export is written."""
    fill(tmp_path / "a.db", 2, 1)
    url = "sqlite+aiosqlite:///a.db"
    command = f"{shlex.quote(sys.executable)} -m layered_store"
    for arguments, code in (
        (f"erase {url} nobody", 0),
        (f"export {url} --all", 0),
        (f"put {url} u-1 --file -", 2),
        (f"get {url} nobody", 1),
    ):
        shell = f"{command} {arguments} <&- >&- 2>error; echo $?"
        done = subprocess.run(  # noqa: S602
            shell, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
        )
        assert len((tmp_path / "error").read_text().strip().splitlines()) == 1
        assert done.stdout == f"{code}\n"


def test_output_that_nobody_reads_on(tmp_path: Path) -> None:
    """When the reader of a pipe has seen enough, as ``head`` does, nothing is complained about."""
    fill(tmp_path / "a.db", 3_000, 1)
    for arguments in (("export", "sqlite+aiosqlite:///a.db", "--all"), ("schema",)):
        writer = subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", "layered_store", *arguments],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert writer.stdout is not None
        assert writer.stdout.read(10)
        writer.stdout.close()
        assert writer.stderr is not None
        complaints = writer.stderr.read().decode()
        writer.wait(30)
        assert "Traceback" not in complaints
        assert "Exception" not in complaints


def test_output_of_another_encoding(tmp_path: Path) -> None:
    """Trees and user ids of all scripts come out where the encoding of the machine has no letters
    for them: a pipe gets UTF-8.
    """
    fill(tmp_path / "a.db", 1, 1)
    url = "sqlite+aiosqlite:///a.db"
    for arguments, expected in (
        (("put", url, "é用", "a=1"), ""),
        (("get", url, "é用"), "é用"),
        (("show",), "└── "),
        (("check", url), "✓ SQLStore healthy"),
    ):
        done = subprocess.run(  # noqa: S603
            [sys.executable, "-m", "layered_store", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout.decode()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device here")
def test_output_that_finds_no_room(tmp_path: Path) -> None:
    """A full disk below the output is one line and exit code 1, whatever wrote it."""
    for arguments in (("schema",), ("show",), ("lint", "--json"), ("check",)):
        with open("/dev/full", "w") as full:
            done = subprocess.run(  # noqa: S603
                [sys.executable, "-m", "layered_store", *arguments],
                cwd=tmp_path,
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                timeout=60,
                check=False,
            )
        assert done.returncode == 1
        assert "No space left" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("no_color", [False, True])
def test_colour_on_a_terminal(tmp_path: Path, *, no_color: bool) -> None:
    """A terminal gets colour; under NO_COLOR it gets letters only, with no style and no bar."""
    pty = pytest.importorskip("pty")
    fill(tmp_path / "a.db", 10, 1)
    shown = ""
    for command in (
        ["show"],
        ["copy", "sqlite+aiosqlite:///a.db", "sqlite+aiosqlite:///b.db"],
        ["bench", "sqlite+aiosqlite:///c.db", "--seconds", "0.3", "--users", "5"],
    ):
        ours, theirs = pty.openpty()
        env = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"TERM": "xterm-256color"}
        if no_color:
            env["NO_COLOR"] = "1"
        writer = subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", "layered_store", *command],
            cwd=tmp_path,
            env=env,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        )
        os.close(theirs)
        with contextlib.suppress(OSError):  # what reading says when the other side has ended
            while data := os.read(ours, 65536):
                shown += data.decode(errors="replace")
        os.close(ours)
        assert writer.wait(60) == 0
    assert "SQLStore" in shown
    assert ("\x1b" in shown) is not no_color


def test_a_database_that_cannot_be_opened(tmp_path: Path) -> None:
    """The check says so, and the thread that tried ends without a word of its own."""
    code = (
        "import asyncio\n"
        "from layered_store.stores.sql import SQLStore\n"
        "async def once():\n"
        "    store = SQLStore('sqlite+aiosqlite:////nowhere/x.db')\n"
        "    assert not await store.health_check()\n"
        "    await store.aclose()\n"
        "for _ in range(40):\n"
        "    asyncio.run(once())\n"
    )
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr == ""
