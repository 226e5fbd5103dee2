"""Redis over TLS, with users and passwords: one server, a cluster, and behind Sentinels."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import Cluster, Guarded, SentinelGroup, Server, start_redis

sys.path.insert(0, str(Path(__file__).parent.parent))

from chaos.stacks import leased, number, serving, started, state, until  # noqa: E402

from layered_store import Cached, RedisStore, SQLStore, UnavailableError  # noqa: E402
from layered_store.testing import check_store  # noqa: E402

KINDS = ["single", "cluster", "sentinels"]


class Secured:
    """One kind of Redis behind TLS and passwords.

    Args:
        kind: one of :data:`KINDS`.
        guarded: its certificates and passwords.
        servers: what runs.
    """

    def __init__(
        self, kind: str, guarded: Guarded, servers: Server | Cluster | SentinelGroup
    ) -> None:
        self.kind = kind
        self.guarded = guarded
        self.servers = servers

    def url(
        self,
        *,
        login: str | None = None,
        sentinel: str | None = None,
        host: str = "127.0.0.1",
        trusting: bool = True,
        tls: bool = True,
    ) -> str:
        """Return the URL that gets in, or one that differs from it in one thing."""
        guarded = self.guarded
        at = f"{guarded.user}:{guarded.password}@" if login is None else login
        scheme = "rediss" if tls else "redis"
        query = [f"ssl_ca_certs={guarded.authority}"] if tls and trusting else []
        if isinstance(self.servers, Server):
            hosts, path = f"{host}:{self.servers.port}", "/0"
        else:
            scheme += "+" + self.kind.removesuffix("s")
            hosts, path = self.servers.hosts.replace("127.0.0.1", host), ""
        if self.kind == "sentinels":
            path = "/mymaster"
            own = guarded.sentinel_password if sentinel is None else sentinel
            query += [f"sentinel_password={own}"] if own else []
        return f"{scheme}://{at}{hosts}{path}" + ("?" + "&".join(query) if query else "")


@pytest.fixture(scope="module", params=KINDS)
def secured(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Secured]:
    guarded = Guarded(tmp_path_factory.mktemp("tls"))
    if request.param == "single":
        with serving(lambda: start_redis(guarded=guarded)) as server:
            yield Secured("single", guarded, server)
        return
    kind = Cluster if request.param == "cluster" else SentinelGroup
    group = started(lambda: kind(guarded=guarded))
    yield Secured(request.param, guarded, group)
    group.close()


async def test_all_of_a_store_works(secured: Secured) -> None:
    """Everything goes over TLS as a user with a password, as the conformance suite wants it."""
    report = await check_store(
        lambda: RedisStore(secured.url(), history_limit=50, timeout=5, connect_timeout=5)
    )
    assert report.ok, str(report)


async def test_two_processes_agree(secured: Secured, tmp_path: Path) -> None:
    """The channel, leases and erasures too: the default user's password is enough for them."""
    url = secured.url(login=f":{secured.guarded.password}@")
    sql = f"sqlite+aiosqlite:///{tmp_path}/states.db"

    def build() -> Cached:
        # A handshake takes a busy machine its time.
        redis = RedisStore(url, timeout=5, connect_timeout=5)
        return Cached(redis, fallback=SQLStore(sql))

    async with build() as one, build() as other:
        await one.upsert_latest(state("u", 1))
        await leased(other, "u")
        await one.upsert_latest(state("u", 2))

        async def shown() -> bool:
            return await number(other, "u") == 2

        await until(shown, "a write at the other process")
        await leased(other, "u")
        await one.delete("u")
        assert await number(other, "u") is None


REFUSED = "refused the login"
DISTRUSTED = "certificate was not accepted"
CASES = {
    "another password": ({"login": "app:wrong-walrus@"}, REFUSED),
    "another user": ({"login": "eve:walrus-4711@"}, REFUSED),
    "no password": ({"login": ""}, REFUSED),
    "an authority of nobody": ({"trusting": False}, DISTRUSTED),
    "another host's certificate": ({"host": "localhost"}, DISTRUSTED),
    "no TLS": ({"tls": False}, ""),
    "another password of the Sentinels": ({"sentinel": "wrong-otter"}, REFUSED),
    "no password of the Sentinels": ({"sentinel": ""}, REFUSED),
}


def _told(kind: str, case: str) -> bool:
    if "Sentinels" in case:
        return kind == "sentinels"
    # Of a node called localhost the driver's client of clusters asks the address instead.
    return kind != "cluster" or "host's" not in case


@pytest.mark.parametrize("case", CASES)
async def test_who_may_not_in_is_told_why(secured: Secured, case: str) -> None:
    """Not worth a repeat, and with no password in any text, cause included."""
    if not _told(secured.kind, case):
        return
    difference, reason = CASES[case]
    store = RedisStore(secured.url(**difference), timeout=5, connect_timeout=5)  # type: ignore[arg-type]
    with pytest.raises(UnavailableError) as caught:
        await store.get_latest("u-1")
    told = "".join(traceback.format_exception(caught.value))
    shown = told + repr(store) + str(await store.health_report())
    # What redis-py tells of Sentinels that it could not reach holds no reason, TLS or not.
    if secured.kind != "sentinels" or "certificate" not in reason:
        assert reason in str(caught.value)
        assert caught.value.retryable is (not reason)
    for secret in ("walrus", "otter"):
        assert secret not in shown
    await store.aclose()
