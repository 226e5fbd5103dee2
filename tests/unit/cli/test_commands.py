"""The commands of the command line."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import click
import pytest
import uvicorn
from click.testing import CliRunner, Result
from rich.console import Console

import layered_store
from layered_store.cli.group import cli
from layered_store.clock import SYSTEM_CLOCK
from layered_store.errors import UnavailableError, ValidationError
from layered_store.health import HealthReport
from layered_store.snapshot import StateSnapshot
from layered_store.stores.memory import MemoryStore
from layered_store.stores.sql import SQLStore

pytestmark = pytest.mark.filterwarnings("ignore::layered_store.config.LintWarning")


@pytest.fixture
def memory(tmp_path: Path) -> str:
    """A stack file."""
    path = tmp_path / "stack.toml"
    path.write_text('[store]\nuse = "memory"\nlayers = [{ use = "cached", ttl = "1m" }]\n')
    return str(path)


def run(*arguments: str, **options: str) -> Result:
    return CliRunner().invoke(cli, list(arguments), **options)  # type: ignore[arg-type]


def test_help_names_every_command() -> None:
    """The help lists all commands, each with a sentence."""
    text = run("--help").output
    for name in (
        "serve",
        "show",
        "check",
        "lint",
        "schema",
        "get",
        "put",
        "erase",
        "history",
        "export",
        "copy",
        "bench",
    ):
        assert f"\n  {name} " in text
        assert run(name, "--help").exit_code == 0


def test_version_of_a_copy_that_pip_did_not_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in the code: a checkout on the path, or a copy within an application, has it too."""

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert run("--version").output == f"layered-store, version {layered_store.__version__}\n"


def test_show(memory: str) -> None:
    """``show`` prints the blocks as a tree, or as data."""
    assert "Cached()" in run("show", memory).output
    blocks = json.loads(run("show", memory, "--json").output)
    assert [block["kind"] for block in blocks] == ["cached", "memory"]


def test_show_draws_branches_with_whole_remarks(tmp_path: Path) -> None:
    """Every block stands under the one that wraps it, and no remark is cut off."""
    path = tmp_path / "stack.toml"
    path.write_text(
        '[store]\nuse = "write_through"\nlayers = [{ use = "cached" }]\n'
        'inner = { use = "redis", url = "redis://h", layers = [{ use = "bulkhead", '
        "max_in_flight = 1 }] }\n"
        'origin = { use = "memory" }\n'
    )
    lines = run("show", str(path)).output.splitlines()
    assert lines[0] == "Cached()  # other processes' writes show at once, after 2 s at the latest"
    assert [line.split("(")[0] for line in lines] == [
        "Cached",
        "└── WriteThrough",
        "    ├── Bulkhead",
        "    │   └── RedisStore",
        "    └── origin: MemoryStore",
    ]


def test_check(memory: str) -> None:
    """``check`` prints the health tree and exits 0 when healthy."""
    done = run("check", memory)
    assert done.exit_code == 0
    assert "✓ MemoryStore healthy" in done.output
    assert "everything works" in done.output
    assert json.loads(run("check", memory, "--json").stdout)["status"] == "healthy"


def test_check_unhealthy() -> None:
    """``check`` exits 1 when the backend cannot be reached."""
    done = run("check", "redis://127.0.0.1:1/0")
    assert done.exit_code == 1
    assert "✗ RedisStore unhealthy" in done.output
    assert "the connection failed (ConnectionRefusedError)" in done.output
    assert "Traceback" not in done.output


def test_check_tells_whole_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However deep a block stands, its reason is wrapped on a terminal and not cut off."""
    path = tmp_path / "deep.toml"
    layers = ", ".join(["{ use = 'read_only' }"] * 12)
    path.write_text(f"[store]\nuse = 'redis'\nurl = 'redis://127.0.0.1:1/0'\nlayers = [{layers}]")
    reason = "RedisStore.health_check: the connection failed (ConnectionRefusedError)"
    assert reason in run("check", str(path)).output
    monkeypatch.setattr("layered_store.cli.common.console._force_terminal", True)
    done = run("check", str(path))
    assert reason not in done.output
    assert "(ConnectionRefusedError)" in done.output.replace("\n", "").replace(" ", "")


HUNG = """
[store]
use = "fallback"
inner = { use = "redis", url = "redis://127.0.0.1:PORT/0" }
secondary = { use = "sql", url = "postgresql+asyncpg://u@127.0.0.1:PORT/x" }
"""


def test_check_of_what_hangs(tmp_path: Path) -> None:
    """Backends that accept connections and never answer are unhealthy within a bounded time."""
    with socket.create_server(("127.0.0.1", 0), backlog=50) as silent:
        path = tmp_path / "hung.toml"
        path.write_text(HUNG.replace("PORT", str(silent.getsockname()[1])))
        began = time.monotonic()
        done = run("check", str(path), "--json")
        assert time.monotonic() - began < 8
    assert done.exit_code == 1
    report = json.loads(done.stdout)
    assert report["status"] == "unhealthy"
    assert [child["status"] for child in report["children"]] == ["unhealthy"] * 2


def test_check_of_a_block_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A third party's probe that never ends, and cannot be ended, is cut off by --timeout."""

    async def for_ever(self: MemoryStore) -> HealthReport:
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(MemoryStore, "health_report", for_ever)
    path = tmp_path / "stack.toml"
    path.write_text('[store]\nuse = "memory"\n')
    done = run("check", str(path), "--timeout", "0.2")
    assert done.exit_code == 1
    assert "no answer within 0.2 s" in done.output


def test_lint(memory: str, tmp_path: Path) -> None:
    """``lint`` lists findings, as data too, and exits 1 only for errors."""
    done = run("lint", memory)
    assert done.exit_code == 0
    assert "LS022 warning" in done.output
    # In a pipe each reason is one line, with nothing behind it.
    assert " are loaded together; set ttl_jitter=0.1\n" in done.output
    assert {f["rule"] for f in json.loads(run("lint", memory, "--json").stdout)} >= {"LS022"}
    allowed = tmp_path / "allowed.toml"
    allowed.write_text(Path(memory).read_text() + '[lint]\nallow = ["LS022", "LS023", "LS039"]\n')
    assert run("lint", str(allowed)).output == "nothing to say\n"


def test_schema() -> None:
    """``schema`` prints the JSON Schema."""
    assert json.loads(run("schema").output)["required"] == ["store"]


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("show", "nothing.toml"), 2, "cannot read"),
        (("get", "nothing.toml", "u-1"), 2, "cannot read"),
        (("get", "STACK", "not an id"), 2, "user_id"),
        (("get", "STACK", "u-1"), 1, "no state"),
        (("put", "STACK", "u-1", "--axis", "warm"), 2, "NAME=VALUE"),
        (("put", "STACK", "u-1", "--axis", "warm=2"), 2, "error: axes"),
        (("put", "STACK", "u-1", "warm=0.1", "warm=0.2"), 2, "twice"),
        (("put", "STACK", "u-1", "warm=0.1", "--file", "-"), 2, "either"),
        (("put", "STACK", "u-1", "--confidence", "1", "--file", "-"), 2, "either"),
        (("export", "STACK"), 2, "USER or --all"),
        (("export", "STACK", "u-1"), 1, "nothing is kept"),
        (("serve", "STACK", "--host", "0.0.0.0"), 2, "without an API key"),  # noqa: S104
        (("serve", "STACK", "--host", "a..b", "--public-without-key"), 2, "no host can have"),
        (("bnch",), 2, "No such command 'bnch'. Did you mean 'bench'?"),
        (("xyz",), 2, "There are show, lint"),
        (("bench", "STACK", "--writes", "0.9", "--erasures", "0.2"), 2, "more than 1"),
        (("bench", "STACK", "--seconds", "nan"), 2, "'nan' is not a number"),
        (("bench", "STACK", "--writes", "nan"), 2, "'nan' is not a number"),
        (("bench", "STACK", "--zipf", "nan"), 2, "'nan' is not a number"),
        (("check", "STACK", "--timeout", "nan"), 2, "'nan' is not a number"),
        (("serve", "STACK", "--patience", "nan"), 2, "'nan' is not a number"),
        (("serve", "STACK", "--patience", "inf"), 2, "Invalid value for '--patience'"),
        (("copy", "STACK", "sqlite:////nowhere/\udcff"), 1, "cannot be opened"),
        (("export", "STACK", "--all", "--output", "/nowhere/x"), 1, "/nowhere/x: No such file"),
        (("copy", "STACK", "STACK", "--state", "/nowhere/x"), 1, "cannot write /nowhere/x"),
        (("show", "."), 2, "ends in .toml or .json"),
        (("get", "states.db", "u-1"), 2, "an SQLite file as sqlite+aiosqlite:///NAME"),
        (("lint", "reddis://host"), 2, "store.url: is not the URL of a backend (did you mean 'red"),
        (("show", "foo://bar"), 2, "store.url"),
        (("get", "redis://:marked-pw@127.0.0.1:1/0", "u-1"), 1, "the connection failed"),
    ],
)
def test_errors_are_one_line(memory: str, arguments: tuple[str, ...], code: int, text: str) -> None:
    """What goes wrong is told without a traceback, with the right exit code."""
    done = run(*(memory if word == "STACK" else word for word in arguments))
    assert done.exit_code == code
    assert text in done.output
    assert "Traceback" not in done.output
    assert "marked-pw" not in done.output


def test_what_no_block_should_raise(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug of a third party's block is one line as well, which quotes nothing of the error."""

    async def broken(self: MemoryStore, user_id: str) -> None:
        raise RuntimeError("marked-text")

    monkeypatch.setattr(MemoryStore, "get_latest", broken)
    done = run("get", memory, "u-1")
    assert done.exit_code == 1
    assert "RuntimeError" in done.output
    assert "marked-text" not in done.output
    monkeypatch.setenv("LAYERED_STORE_TRACEBACK", "1")
    assert isinstance(run("get", memory, "u-1").exception, RuntimeError)


@pytest.mark.parametrize(
    ("scheme", "extra"),
    [
        ("postgresql+asyncpg", "postgres"),
        ("postgresql+psycopg", "psycopg"),
        ("mysql+aiomysql", "mysql"),
        ("mysql+asyncmy", "asyncmy"),
    ],
)
def test_missing_driver(monkeypatch: pytest.MonkeyPatch, scheme: str, extra: str) -> None:
    """A backend whose driver is not installed says which extra to install."""
    monkeypatch.setitem(sys.modules, scheme.partition("+")[2], None)
    done = run("get", f"{scheme}://u@127.0.0.1:1/x", "u-1")
    assert done.exit_code == 2
    assert f"pip install 'layered-store[{extra}]'" in done.output


def test_bench(memory: str) -> None:
    """``bench`` measures and gives figures as data."""
    done = run("bench", memory, "--seconds", "0.2", "--users", "20", "--json")
    assert done.exit_code == 0
    result = json.loads(done.stdout)
    assert result["errors"] == 0
    assert result["operations"]["get_latest"]["calls"] > 10
    assert 0 <= result["hit_ratio"]["0.cached"] <= 1


def test_bench_mix(memory: str) -> None:
    """The shares of the operations and the skew of the users are as chosen, and errors told apart.

    Afterwards none of the users is left.
    """
    mix = ("--writes", "0.3", "--histories", "0.2", "--erasures", "0.1", "--zipf", "0")
    done = run("bench", memory, "--seconds", "0.5", "--users", "50", *mix, "--json")
    operations = json.loads(done.stdout)["operations"]
    total = sum(figures["calls"] for figures in operations.values())
    for operation, share in (
        ("upsert_latest", 0.3),
        ("get_history", 0.2),
        ("delete", 0.1),
        ("get_latest", 0.4),
    ):
        assert operations[operation]["calls"] / total == pytest.approx(share, abs=0.05)
        assert operations[operation]["p50_ms"] <= operations[operation]["p99_ms"]


def test_bench_table(memory: str) -> None:
    """The table names the setting, and the errors by their kind."""
    done = run("bench", memory, "--seconds", "0.2", "--users", "20")
    assert "32 callers, 20 users, zipf 0.99, 10% writes" in done.output
    assert "a second" in done.output
    assert "hit ratio: 0.cached" in done.output


async def test_bench_erases_its_users() -> None:
    """Whether it ends or is interrupted: its users are gone, and no others."""
    from layered_store.cli.bench_command import _Bench
    from layered_store.cli.workload import Mix, Workload
    from layered_store.snapshot import StateSnapshot

    store = MemoryStore()
    await store.upsert_latest(StateSnapshot("bench-1"))
    workload = Workload("bench-x-", 700, Mix(writes=0.5), zipf=1.0, axes=2, seed=1)
    bench = _Bench(workload, 60.0, 4, keep=False)
    task = asyncio.create_task(bench.run(store))
    while not workload.calls.total():  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert len((await store.users("", 1000)).user_ids) == 701
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert list((await store.users("", 1000)).user_ids) == ["bench-1"]


async def test_zipf() -> None:
    """The first user is asked for as often as the exponent says."""
    from layered_store.cli.workload import Mix, Workload

    async def share_of_first(zipf: float) -> float:
        seen = []

        class Noting(MemoryStore):
            async def upsert_latest(self, snapshot: StateSnapshot) -> None:
                seen.append(snapshot.user_id)
                if len(seen) == 5_000:
                    raise asyncio.CancelledError

        workload = Workload("u-", 100, Mix(writes=1.0), zipf=zipf, axes=0, seed=1)
        with pytest.raises(asyncio.CancelledError):
            await workload.call_until(Noting(), float("inf"))
        return seen.count("u-0") / len(seen)

    harmonic = sum(1 / n for n in range(1, 101))
    assert await share_of_first(1.0) == pytest.approx(1 / harmonic, abs=0.03)
    assert await share_of_first(0.0) == pytest.approx(0.01, abs=0.01)


async def test_each_caller_of_a_bench_makes_a_call() -> None:
    """However slowly the machine comes to it: there is always something to show."""
    from layered_store.cli.workload import Mix, Workload

    workload = Workload("u-", 10, Mix(), zipf=1.0, axes=0, seed=1)
    store = MemoryStore()
    now = workload.begin(store, SYSTEM_CLOCK.monotonic)
    await workload.call_until(store, now - 1.0)
    assert workload.calls == {"get_latest": 1}


def test_no_colour_when_not_a_terminal(memory: str) -> None:
    """Nothing but text goes into a pipe."""
    assert "\x1b" not in run("check", memory).output


def test_tells_how_to_install_the_extra() -> None:
    """Without click the program says which extra to install, and exits 2."""
    code = (
        "import sys; sys.modules['click'] = None\n"
        "from layered_store.cli import main\n"
        "main(['--help'])\n"
    )
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "layered-store[cli]" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_service_tells_how_to_install_its_extra() -> None:
    """Who imports it without starlette is told what to install; other errors pass unchanged."""
    for missing, told in (("starlette", "layered-store[serve]"), ("msgspec", "msgspec")):
        code = f"import sys; sys.modules[{missing!r}] = None\nimport layered_store.service"
        done = subprocess.run(  # noqa: S603
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("ModuleNotFoundError")
        assert told in last


def test_where_the_api_key_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the file when one is named, else from the environment; one set to nothing is none."""
    from layered_store.cli.serve_command import _is_local, _key

    path = tmp_path / "key"
    path.write_text("from-file\n")
    monkeypatch.setenv("LAYERED_STORE_API_KEY", "from-environment ")
    assert (_key(path), _key(None)) == ("from-file", "from-environment")
    for nothing in ("", "  "):
        monkeypatch.setenv("LAYERED_STORE_API_KEY", nothing)
        assert _key(None) is None
    for content in (b"", b" \n", b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(click.UsageError):
            _key(path)
    for host in ("127.0.0.1", "127.8.9.1", "::1", "localhost"):
        assert _is_local(host)
    for host in ("0.0.0.0", "::", "", "10.0.0.1", "localhost.example.org", "::ffff:10.0.0.1"):  # noqa: S104
        assert not _is_local(host)


class Finalized:
    """Gone at once; what its finalizer raises is dropped."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


def test_a_signal_to_end_is_heard_before_the_server_listens(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it arrives: the stack is opened and closed, and the exit code is 0."""
    run_server = uvicorn.Server.run

    def run_later(server: uvicorn.Server) -> None:
        Finalized()
        server.config.callback_notify = own_end
        server.config.timeout_notify = 0
        run_server(server)

    async def own_end() -> None:
        raise AssertionError("it serves on")

    monkeypatch.setattr(uvicorn.Server, "run", run_later)
    before = signal.getsignal(signal.SIGTERM)
    try:
        result = run("serve", memory, "--port", "0")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert result.exit_code == 0, result.exception


@pytest.fixture
def database(tmp_path: Path) -> str:
    """A stack file over SQLite, which keeps what one command wrote for the next."""
    path = tmp_path / "sql.toml"
    url = f"sqlite+aiosqlite:///{tmp_path / 'store.db'}"
    path.write_text(f'[store]\nuse = "sql"\nurl = "{url}"\n')
    return str(path)


def test_a_state_comes_from_a_file(database: str) -> None:
    """As JSON, for the user that the command names."""
    state = '{"user_id": "other", "axes": {"warmth": 0.7}, "updated_at_unix_ms": 5}'
    assert run("put", database, "u-1", "--file", "-", input=state).exit_code == 0
    kept = json.loads(run("get", database, "u-1").output)
    assert (kept["user_id"], kept["axes"], kept["updated_at_unix_ms"]) == (
        "u-1",
        {"warmth": 0.7},
        5,
    )
    assert run("get", database, "other").exit_code == 1


class Mood(StateSnapshot, frozen=True):
    """A class with a field that has a default."""

    note: str = "none"


class Noted(StateSnapshot, frozen=True, kw_only=True):
    """A class with a field that must be given."""

    note: str


def test_states_of_a_class_of_the_applications(tmp_path: Path) -> None:
    """They are stored and made up as that class; where they cannot be, the way is said."""
    path = tmp_path / "stack.toml"
    text = '[store]\nuse = "sql"\nurl = "sqlite:///{}.db"\nsnapshot_type = "{}:{}"\n'
    path.write_text(text.format(tmp_path / "mood", __name__, "Mood"))
    stack = str(path)
    assert run("put", stack, "u-1", "warmth=0.7").exit_code == 0
    assert json.loads(run("get", stack, "u-1").output)["note"] == "none"
    done = run("bench", stack, "--seconds", "0.1", "--users", "5", "--json")
    assert json.loads(done.stdout)["errors"] == 0
    path.write_text(text.format(tmp_path / "noted", __name__, "Noted"))
    for arguments in (("put", stack, "u-1", "warmth=0.7"), ("bench", stack, "--users", "5")):
        done = run(*arguments)
        assert done.exit_code == 2
        assert "are Noteds, with fields that must be given: only put --file can" in done.output
    state = '{"user_id": "u-1", "note": "hello"}'
    assert run("put", stack, "u-1", "--file", "-", input=state).exit_code == 0
    assert json.loads(run("get", stack, "u-1").output)["note"] == "hello"


class Scored(StateSnapshot, frozen=True):
    """A class with a field that may hold what JSON has no form for."""

    score: float = 0.0


def test_an_export_goes_on_past_what_json_cannot_hold(tmp_path: Path) -> None:
    """That user is left out and told of, as one whose record cannot be read is."""
    path, url = tmp_path / "stack.toml", f"sqlite:///{tmp_path / 'scored'}.db"
    kind = f"{__name__}:{Scored.__name__}"
    path.write_text(f'[store]\nuse = "sql"\nurl = "{url}"\nsnapshot_type = "{kind}"\n')

    async def fill() -> None:
        async with SQLStore(url, snapshot_type=Scored) as store:
            scores = {"u-1": 0.5, "u-2": float("nan"), "u-3": 1.5}
            await store.upsert_latest_many(Scored(user, score=s) for user, s in scores.items())

    asyncio.run(fill())
    done = run("export", str(path), "--all")
    assert done.exit_code == 1
    assert {json.loads(line)["user_id"] for line in done.stdout.splitlines()} == {"u-1", "u-3"}
    assert "1 users were left out" in done.output


def test_input_is_read_where_an_interruption_reaches_it(database: str) -> None:
    """A loop that waits for a terminal holds the first Ctrl-C back for ever."""
    loops: list[object] = []

    class Input(io.BytesIO):
        def read(self, *size: int | None) -> bytes:
            loops.append(asyncio._get_running_loop())
            return super().read(*size)

    state = Input(b'{"user_id": "u-1"}')
    assert CliRunner().invoke(cli, ["put", database, "u-1", "--file", "-"], state).exit_code == 0
    assert set(loops) == {None}


@pytest.mark.parametrize("axis", ["warmth", "warmth=much", "=0.5"])
def test_an_axis_that_is_none_is_refused(database: str, axis: str) -> None:
    """One line says how an axis is written, or what is wrong with its name."""
    done = run("put", database, "u-1", axis)
    assert done.exit_code in (1, 2)
    assert "Traceback" not in done.output
    assert run("get", database, "u-1").exit_code == 1


def test_moments_that_no_calendar_has_are_shown_as_numbers(database: str) -> None:
    """Any 64-bit number of milliseconds is a valid time of a state."""
    for moment in (2**62, 1_000):
        state = json.dumps({"user_id": "u-1", "updated_at_unix_ms": moment})
        assert run("put", database, "u-1", "--file", "-", input=state).exit_code == 0
    text = run("history", database, "u-1", "--limit", "9").output
    assert f"{2**62} ms" in text
    assert "1970-01-01T00:00:01.000+00:00" in text


def test_tables_are_whole(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a pipe a row is one line, however long; on a terminal nothing is cut off to fit."""
    axes = [f"axis_{number}=0.25" for number in range(23)]
    assert run("put", database, "u-1", *axes).exit_code == 0
    (row,) = [line for line in run("history", database, "u-1").output.splitlines() if "2" in line]
    assert "+00:00" in row
    assert ", ".join(axes) in row
    monkeypatch.setattr("layered_store.cli.common.console._force_terminal", True)
    monkeypatch.setattr("layered_store.cli.common.console._width", 80)
    text = run("history", database, "u-1").output
    assert "…" not in text
    assert "+00:00" in text
    assert all(axis in text for axis in axes)
    # A narrow one folds the rest as well, before no room is left for the axes.
    monkeypatch.setattr("layered_store.cli.common.console._width", 60)
    text = run("history", database, "u-1").output
    assert "…" not in text
    assert all(axis.partition("=")[0] in text for axis in axes)


def test_figures_of_long_runs_fit_in_a_terminal() -> None:
    """A figure that is cut off would be read as another."""
    from layered_store.cli.bench_command import _view

    figures = {"calls": 12_345_678, "per_second": 654_321.4, "max_ms": 9_876.54}
    figures |= {f"p{p}_ms": value for p, value in (("50", 0.0003), ("90", 0.25), ("99", 2.5))}
    figures |= {"p99.9_ms": 123.45}
    result = {"operations": {"get_latest": figures}, "seconds": 10, "errors": 0, "hit_ratio": {}}
    for width, whole in ((80, True), (50, False)):
        console = Console(file=io.StringIO(), width=width)
        console.print(_view(result, "a setting"))
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert "…" not in text
        assert ("12,345,678" in text and "654,321" in text and "9,876.54" in text) is whole


def test_on_a_terminal_states_are_laid_out_and_erasures_confirmed(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a pipe neither: there a program reads, and nobody could answer."""
    assert run("put", database, "u-1", "warmth=0.7").exit_code == 0
    assert run("get", database, "u-1").output.count("\n") == 1
    monkeypatch.setattr("layered_store.cli.common.console._force_terminal", True)
    assert run("get", database, "u-1").output.count("\n") > 5
    refused = _with_terminal("erase", database, "u-1", input="n\n")
    assert "history included?" in refused.output
    assert refused.exit_code == 1
    interrupted = _with_terminal("erase", database, "u-1", input="")
    assert interrupted.exit_code == 130
    assert "error: interrupted" in interrupted.output
    assert run("get", database, "u-1").exit_code == 0
    assert _with_terminal("erase", database, "u-1", input="y\n").exit_code == 0
    assert run("get", database, "u-1").exit_code == 1


def _with_terminal(*arguments: str, input: str) -> Result:  # noqa: A002
    """Run a command whose standard input says that it is a terminal."""

    class Runner(CliRunner):
        @contextlib.contextmanager
        def isolation(self, *args: object, **options: object) -> Iterator[object]:
            with super().isolation(*args, **options) as streams:  # type: ignore[arg-type]
                sys.stdin.isatty = lambda: True  # type: ignore[method-assign]
                yield streams

    return Runner().invoke(cli, list(arguments), input=input)


def test_a_command_that_is_none_and_one_whose_package_is_missing(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first names no command; the second names the package or the extra."""
    done = run("shwo", memory)
    assert done.exit_code == 2
    assert "No such command" in done.output
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "layered_store.service.server", raising=False)
    done = run("serve", memory)
    assert done.exit_code == 2
    assert "pip install 'layered-store[serve]'" in done.output


async def test_shell_completion_knows_the_commands() -> None:
    """They are listed without importing any."""
    context = click.Context(cli)
    assert set(cli.list_commands(context)) >= {"get", "put", "serve", "bench"}
    assert cli.get_command(context, "shwo") is None


def test_bench_tells_whom_a_tier_has_still_to_hear_of(tmp_path: Path) -> None:
    """Erasures that a tier missed are no failure of the measurement, and are counted at the end."""
    path = tmp_path / "stack.toml"
    path.write_text(
        '[store]\nuse = "write_through"\n'
        'inner = { use = "redis", url = "redis://127.0.0.1:1/0" }\n'
        'origin = { use = "memory" }\n'
    )
    done = run("bench", str(path), "--seconds", "0.1", "--users", "7", "--callers", "2", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["errors"] == 0
    assert "7 users are erased in the system of record only" in " ".join(done.stderr.split())


def test_bench_keeps_its_users_when_told(tmp_path: Path) -> None:
    """And says which they are."""
    url = f"sqlite+aiosqlite:///{tmp_path / 'a.db'}"
    path = tmp_path / "stack.toml"
    path.write_text(f'[store]\nuse = "sql"\nurl = "{url}"\n')
    done = run("bench", str(path), "--seconds", "0.1", "--users", "3", "--keep")
    assert done.exit_code == 0, done.output
    told = " ".join(done.stderr.split())
    assert "are left in the store" in told
    first = told.partition("the users ")[2].partition(" ")[0]
    assert first.startswith("bench-") and first.endswith("-0")
    assert first.removesuffix("-0") + "-2" in told
    found = run("get", str(path), first)
    assert found.exit_code == 0, found.output


class Refusing(MemoryStore):
    """Reads are refused, and so are erasures once told."""

    erasures = True

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        raise UnavailableError("away")

    async def delete(self, user_id: str) -> None:
        if not self.erasures:
            raise UnavailableError("away")
        await super().delete(user_id)


async def test_bench_counts_errors_by_their_kind_and_goes_on() -> None:
    """They count as calls, and the table names them; one that leaves users behind is raised."""
    from layered_store.cli.bench_command import _Bench, _view
    from layered_store.cli.workload import Mix, Workload

    store = Refusing()
    workload = Workload("bench-x-", 5, Mix(writes=0.5), zipf=0.0, axes=1, seed=1)
    bench = _Bench(workload, 0.1, 2, keep=False)
    await bench.run(store)
    result = workload.result()
    reads = result["operations"]["get_latest"]["calls"]
    assert reads > 0
    assert result["errors"] == reads
    assert result["error_kinds"] == {"UnavailableError": reads}
    text = io.StringIO()
    Console(file=text, width=200).print(_view(result, bench.setting))
    assert f"{reads:,} errors: {reads:,} UnavailableError" in text.getvalue()
    assert list((await store.users("", 10)).user_ids) == []
    store.erasures = False
    again = Workload("bench-x-", 5, Mix(writes=1.0), zipf=0.0, axes=1, seed=1)
    with pytest.raises(UnavailableError):
        await _Bench(again, 0.1, 1, keep=False).run(store)


def test_percentiles_of_a_long_run_are_of_all_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many times are kept and no more, each call as likely as any other."""
    from layered_store.cli import workload as module

    monkeypatch.setattr(module, "_KEPT", 1_000)
    load = module.Workload("u-", 1, module.Mix(), zipf=0.0, axes=0, seed=1)
    for number in range(20_000):
        load._note("get_latest", number / 1000)
    assert len(load._times["get_latest"]) == 1_000
    figures = load.result()["operations"]["get_latest"]
    assert figures["calls"] == 20_000
    assert figures["p50_ms"] == pytest.approx(10_000, rel=0.1)


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (FileNotFoundError(2, "No such file or directory", "x.toml"), 1, "x.toml: No such file"),
        (PermissionError(), 1, "PermissionError"),
        (ValidationError("axes.a: must be at most 1"), 2, "axes.a: must be at most 1"),
        (ModuleNotFoundError(name="asyncpg"), 2, "this needs asyncpg"),
    ],
)
def test_whatever_ends_a_command_is_one_line(
    error: BaseException, code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a traceback, with a code that scripts can tell apart."""
    from layered_store.cli.common import guarded

    def work() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        guarded(work)
    assert caught.value.code == code
    told = capsys.readouterr().err
    assert text in told and "Traceback" not in told


def test_the_linters_warnings_stand_on_stderr(tmp_path: Path) -> None:
    """So that what is printed for programs stays whole."""
    path = tmp_path / "stack.toml"
    path.write_text(
        '[store]\nuse = "memory"\n'
        'layers = [{ use = "cached" }, { use = "retry" }, { use = "cached" }]\n'
    )
    done = run("check", str(path))
    assert done.exit_code == 0
    for rule in ("LS037", "LS040"):
        assert f"warning: {rule}" in done.stderr and rule not in done.stdout
    assert "LS039" not in done.stderr  # a note
