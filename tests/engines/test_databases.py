"""SQLStore on databases behind a pooler, over TLS, with passwords, and with clients that vanish."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import Server, make_certificates, start_pgbouncer, start_postgres

sys.path.insert(0, str(Path(__file__).parent.parent))

from chaos.stacks import number, serving, state, until  # noqa: E402

from layered_store import SQLStore, UnavailableError  # noqa: E402
from layered_store.testing import check_store  # noqa: E402

DRIVERS = ["postgresql+asyncpg", "postgresql+psycopg"]
PASSWORD = "walrus-4711"  # noqa: S105


@pytest.fixture(scope="module")
def postgres() -> Iterator[Server]:
    with serving(start_postgres) as server:
        yield server


_CHILD = """
import asyncio, sys
from layered_store import *
async def main():
    failed = []
    async with SQLStore(sys.argv[1], timeout=30) as store:
        async def one(user):
            for number in range(1, 21):
                try:
                    await store.upsert_latest(StateSnapshot(user, number))
                    assert (await store.get_latest(user)).updated_at_unix_ms == number
                    assert len(await store.get_history(user, 3)) == min(3, number)
                except Exception as exc:
                    failed.append(str(exc))
        await asyncio.gather(*(one(f"{sys.argv[2]}-{index}") for index in range(8)))
        await store.delete(f"{sys.argv[2]}-0")
        assert await store.get_latest(f"{sys.argv[2]}-0") is None
    print(failed)
asyncio.run(main())
"""


@pytest.mark.parametrize("driver", DRIVERS)
async def test_behind_pgbouncer_in_transaction_mode(postgres: Server, driver: str) -> None:
    """Three processes through four connections, with nothing set: no call fails."""
    with serving(lambda: start_pgbouncer(postgres.port)) as bouncer:
        url = f"{driver}://tester@127.0.0.1:{bouncer.port}/postgres"
        children = [
            await asyncio.create_subprocess_exec(
                sys.executable, "-W", "error", "-c", _CHILD, url, f"{driver[11:]}-{index}",
                stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent.parent,
            )
            for index in range(3)
        ]  # fmt: skip
        for child in children:
            assert child.stdout is not None
            assert await child.stdout.read() == b"[]\n"
            assert await child.wait() == 0


_VANISHES = """
import asyncio, os, signal, sys
from layered_store import *
from layered_store.stores.sql import transactions
async def main():
    store = SQLStore(sys.argv[1], timeout=4.0)
    await store.upsert_latest(StateSnapshot("u", 1))
    async def work(session):
        await session.begin()
        await transactions._lock(session, [store.digest("u")], session.measure())
        os.kill(os.getpid(), signal.SIGSTOP)
    await store._access.run("test", work)
asyncio.run(main())
"""


@pytest.mark.parametrize("driver", DRIVERS)
async def test_a_client_that_vanishes_in_a_transaction(postgres: Server, driver: str) -> None:
    """Its locks end by the server's limit: another writer of the same user comes through."""
    url = f"{driver}://tester@127.0.0.1:{postgres.port}/postgres"
    child = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", _VANISHES, url],
        cwd=Path(__file__).parent.parent.parent,
        stderr=subprocess.DEVNULL,
    )
    try:
        stopped = Path(f"/proc/{child.pid}/status")
        await until(lambda: "State:\tT" in stopped.read_text(), "a client that stopped")
        async with SQLStore(url, timeout=1.0) as other:
            with pytest.raises(UnavailableError):
                await other.upsert_latest(state("u", 2))

            async def through() -> bool:
                try:
                    await other.upsert_latest(state("u", 3))
                except UnavailableError:
                    return False
                return True

            await until(through, "a write past the one who vanished", 20)
            assert await number(other, "u") == 3
    finally:
        child.kill()
        child.wait()


@pytest.fixture(scope="module")
def secure_postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """A PostgreSQL that takes connections over TLS with a password, and no other."""
    with serving(start_postgres) as server:
        authority, certificate, key = make_certificates(tmp_path_factory.mktemp("tls"))
        data = server.folder / "data"
        owner = data.stat()
        import os
        import shutil

        for source, name in ((certificate, "server.crt"), (key, "server.key")):
            target = data / name
            shutil.copy(source, target)
            target.chmod(0o600)
            os.chown(target, owner.st_uid, owner.st_gid)

        async def make_user() -> None:
            import asyncpg

            connection = await asyncpg.connect(
                host="127.0.0.1", port=server.port, user="tester", database="postgres"
            )
            await connection.execute(f"CREATE ROLE app LOGIN PASSWORD '{PASSWORD}' CREATEDB")
            await connection.execute("CREATE DATABASE app OWNER app")
            await connection.close()

        from threading import Thread

        thread = Thread(target=lambda: asyncio.run(make_user()))
        thread.start()
        thread.join()
        (data / "pg_hba.conf").write_text("hostssl all app 127.0.0.1/32 scram-sha-256\n")
        with (data / "postgresql.conf").open("a") as file:
            file.write("\nssl = on\n")
        server.kill()
        (data / "postmaster.pid").unlink(missing_ok=True)
        _start_again(server)
        yield server, authority


def _start_again(server: Server) -> None:
    """Start a killed PostgreSQL and wait until it lets in."""
    import time

    import psycopg

    for _ in range(100):
        try:
            if not server.running:
                server.start()  # not before the last of its processes is gone
            psycopg.connect(
                f"host=127.0.0.1 port={server.port} user=app password={PASSWORD} dbname=app"
            ).close()
            return
        except (RuntimeError, psycopg.Error):
            time.sleep(0.2)
    raise RuntimeError("PostgreSQL did not come back")


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+asyncpg://app:{password}@127.0.0.1:{port}/app?ssl=require",
        "postgresql+psycopg://app:{password}@127.0.0.1:{port}/app"
        "?sslmode=verify-full&sslrootcert={authority}",
        "postgresql+asyncpg://app:{password}@127.0.0.1:{port}/app?ssl=verify-full",
        "postgres://app:{password}@127.0.0.1:{port}/app?sslmode=verify-full",
    ],
    ids=["asyncpg", "psycopg", "asyncpg verifies", "hosted"],
)
async def test_tls_and_a_password(
    secure_postgres: tuple[Server, Path], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The URL goes whole to the driver, and all of a store works; a wrong password fails at once
    and shows nowhere.
    """
    server, authority = secure_postgres
    monkeypatch.setenv("PGSSLROOTCERT", str(authority))  # where asyncpg looks
    places = {"port": server.port, "authority": authority}
    right_url = url.format(password=PASSWORD, **places)
    report = await check_store(lambda: SQLStore(right_url, timeout=30))
    assert report.ok, str(report)
    assert "versions" in report.abilities
    for right, wrong in ((PASSWORD, "wrong-" + PASSWORD), ("app:", "eve:")):
        store = SQLStore(url.format(password=PASSWORD, **places).replace(right, wrong))
        with pytest.raises(UnavailableError, match="refused the login") as caught:
            await store.get_latest("u")
        assert not caught.value.retryable
        assert PASSWORD not in "".join(traceback.format_exception(caught.value)) + repr(store)
        await store.aclose()
    plain = SQLStore(f"postgresql+asyncpg://app:{PASSWORD}@127.0.0.1:{server.port}/app?ssl=disable")
    with pytest.raises(UnavailableError):
        await plain.get_latest("u")
    await plain.aclose()


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@pytest.mark.parametrize("why", ["its authority is unknown", "it names another host"])
async def test_a_certificate_that_proves_nothing_is_refused(
    secure_postgres: tuple[Server, Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    driver: str,
    why: str,
) -> None:
    """Asked to verify, the driver does, and the error says what is wrong."""
    server, authority = secure_postgres
    host = "localhost" if "host" in why else "127.0.0.1"
    if "authority" in why:
        authority, _, _ = make_certificates(tmp_path)
    monkeypatch.setenv("PGSSLROOTCERT", str(authority))
    mode = "ssl" if driver == "asyncpg" else "sslmode"
    url = f"postgresql+{driver}://app:{PASSWORD}@{host}:{server.port}/app?{mode}=verify-full"
    store = SQLStore(url)
    with pytest.raises(UnavailableError, match="certificate was not accepted") as caught:
        await store.get_latest("u")
    assert not caught.value.retryable
    assert PASSWORD not in "".join(traceback.format_exception(caught.value))
    await store.aclose()
