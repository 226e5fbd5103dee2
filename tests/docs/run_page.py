"""Run the blocks of one page in its own process: ``run_page.py PAGE`` with placeholders in JSON.

Python blocks share one namespace and may ``await``; shell blocks run in the same folder; a block
with a title is written to that file first. TOML must be a stack that loads, or the part of one.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import inspect
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
import traceback
import warnings
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).parent))

from blocks import Block, blocks

SHELL_SECONDS = 60
_NOTHING_TO_RUN = {"", "text", "promql", "mermaid", "md", "html"}


class Page:
    """A page that is being run.

    Args:
        path: the page.
        placeholders: texts of the page and what stands for them here.
    """

    def __init__(self, path: Path, placeholders: dict[str, str]) -> None:
        self.path = path
        self.placeholders = placeholders
        # A module, since dataclasses and typing look their class's module up.
        module = sys.modules["page"] = ModuleType("page")
        self.names = module.__dict__
        self.loop = asyncio.new_event_loop()
        self.printed = ""
        self.background: list[subprocess.Popen[bytes]] = []

    def run(self) -> None:
        try:
            for block in blocks(self.path):
                try:
                    self.run_block(block)
                except BaseException as exc:
                    exc.add_note(f"in the block at {self.path.name}:{block.line}")
                    raise
        finally:
            for process in self.background:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)
                process.wait(10)

    def run_block(self, block: Block) -> None:
        if block.comment == "not run":
            return
        code = self.replace(block.code)
        if block.comment == "prints":
            self.compare(code)
            return
        if block.title is not None:
            Path(block.title).parent.mkdir(parents=True, exist_ok=True)
            Path(block.title).write_text(code)
        if block.language in _NOTHING_TO_RUN:
            return
        match block.language:
            case "python":
                if block.title is None:
                    self.python(code, block.line)
                else:
                    compile(code, block.title, "exec")
            case "toml":
                self.toml(code)
            case "json":
                json.loads(code)
            case "yaml":
                import yaml

                yaml.safe_load(code)
            case "sh":
                self.shell(code, block)
            case "console":
                commands = [line[2:] for line in code.splitlines() if line.startswith("$ ")]
                self.shell("\n".join(commands), block)
            case other:
                raise ValueError(f"no way to run {other!r}; say '<!-- not run: why -->' above it")

    def replace(self, code: str) -> str:
        for placeholder, real in self.placeholders.items():
            code = code.replace(placeholder, real)
        return code

    def python(self, code: str, line: int) -> None:
        # Padded, so that a traceback shows lines of the page.
        compiled = compile(
            "\n" * (line - 1) + code,
            str(self.path),
            "exec",
            ast.PyCF_ALLOW_TOP_LEVEL_AWAIT,
        )
        output = io.StringIO()
        try:
            with contextlib.redirect_stdout(output):
                if compiled.co_flags & inspect.CO_COROUTINE:
                    self.loop.run_until_complete(eval(compiled, self.names))  # noqa: S307
                else:
                    exec(compiled, self.names)  # noqa: S102
        finally:
            self.printed = output.getvalue()

    def toml(self, code: str) -> None:
        table = tomllib.loads(code)
        if "project" in table or "tool" in table:
            return
        if "store" not in table:
            # A part of a file: options of a block, or layers around one.
            part = {key: table.pop(key) for key in list(table) if key != "lint"}
            table["store"] = {"use": "memory", **part}
        # Variables that only the reader's machine has.
        for name in re.findall(r"\$\{(\w+)\}", code):
            os.environ.setdefault(name, "sqlite+aiosqlite:///variable.db")
        from layered_store import load_stack

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load_stack(table)

    def shell(self, code: str, block: Block) -> None:
        process = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", code],
            stdout=subprocess.PIPE if block.comment != "background" else None,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.background.append(process)
        if block.comment == "background":
            self.wait_for_port(int(self.replace(block.text or "")), process)
            return
        output, _ = process.communicate(timeout=SHELL_SECONDS)
        self.printed = output.decode()
        if process.returncode:
            raise RuntimeError(f"exit code {process.returncode}:\n{self.printed[-3000:]}")

    def wait_for_port(self, port: int, process: subprocess.Popen[bytes]) -> None:
        until = time.monotonic() + SHELL_SECONDS
        while time.monotonic() < until and process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.2):
                return
            time.sleep(0.05)
        raise RuntimeError(f"nothing listens on port {port}")

    def compare(self, expected: str) -> None:
        pattern = re.escape(_bare(expected)).replace(re.escape("..."), ".*?")
        if not re.fullmatch(pattern, _bare(self.printed), re.DOTALL):
            raise AssertionError(f"expected:\n{expected}\nbut it printed:\n{self.printed}")


def _bare(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    try:
        Page(Path(sys.argv[1]), json.loads(sys.argv[2])).run()
    except Exception:
        traceback.print_exc()
        sys.exit(1)
