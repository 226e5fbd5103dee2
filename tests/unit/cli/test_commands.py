"""The commands of the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from layered_store.cli.group import cli

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
        'max_in_flight = 1 }] }\n'
        'origin = { use = "memory" }\n'
    )
    lines = run("show", str(path)).output.splitlines()
    assert lines[0].endswith("; lease 1 s")
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
    assert "MemoryStore healthy" in done.output
    assert json.loads(run("check", memory, "--json").stdout)["status"] == "healthy"


def test_check_unhealthy() -> None:
    """``check`` exits 1 when the backend cannot be reached."""
    pytest.importorskip("layered_store.stores.redis", reason="no RedisStore yet")
    done = run("check", "redis://127.0.0.1:1/0")
    assert done.exit_code == 1
    assert "Traceback" not in done.output


def test_lint(memory: str, tmp_path: Path) -> None:
    """``lint`` lists findings, as data too, and exits 1 only for errors."""
    done = run("lint", memory)
    assert done.exit_code == 0
    assert "LS022 warning" in done.output
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
        (("get", "STACK", "not an id"), 1, "user_id"),
        (("get", "STACK", "u-1"), 1, "no state"),
        (("put", "STACK", "u-1", "--axis", "warm"), 2, "NAME=VALUE"),
        (("put", "STACK", "u-1", "--axis", "warm=2"), 1, "axes"),
        (("export", "STACK"), 2, "USER or --all"),
        (("export", "STACK", "u-1"), 1, "nothing is kept"),
        (("serve", "STACK", "--host", "0.0.0.0"), 2, "without an API key"),  # noqa: S104
        (("bnch",), 2, "No such command"),
    ],
)
def test_errors_are_one_line(memory: str, arguments: tuple[str, ...], code: int, text: str) -> None:
    """What goes wrong is told without a traceback, with the right exit code."""
    done = run(*(memory if word == "STACK" else word for word in arguments))
    assert done.exit_code == code
    assert text in done.output
    assert "Traceback" not in done.output


def test_bench(memory: str) -> None:
    """``bench`` measures and gives figures as data."""
    done = run("bench", memory, "--seconds", "0.2", "--users", "20", "--json")
    assert done.exit_code == 0
    result = json.loads(done.stdout)
    assert result["errors"] == 0
    assert result["operations"]["get_latest"]["calls"] > 10
    assert 0 <= result["hit_ratio"]["0.cached"] <= 1


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
