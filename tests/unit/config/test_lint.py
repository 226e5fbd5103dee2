"""Each rule of the linter, with a stack that is wrong and one that is right."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool

from layered_store.config import LintWarning, Severity, lint, load_stack
from layered_store.config.lint import RULES
from layered_store.errors import ConfigError, StoreError, UnavailableError
from layered_store.interface import Op, StateStore
from layered_store.layer import AroundLayer, Layer
from layered_store.layers.cached import Cached
from layered_store.layers.compressed import Compressed
from layered_store.layers.encrypted import Encrypted
from layered_store.layers.ramp import Ramp
from layered_store.layers.read_only import ReadOnly
from layered_store.layers.shadow import Shadow
from layered_store.layers.write_through import WriteThrough
from layered_store.snapshot import StateSnapshot
from layered_store.stores.memory import MemoryStore
from layered_store.stores.redis import RedisStore
from layered_store.stores.sql import SQLStore

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from layered_store.coherence.contract import Notice


# Blocks with the kinds and option names of the real ones, and nothing else: the rules look at
# kinds and options, never at classes, so that they judge third parties' blocks too.


@dataclass(eq=False, repr=False)
class _Around(AroundLayer):
    async def around(
        self, op: Op, method: Callable[..., Awaitable[Any]], /, *args: Any, **kw: Any
    ) -> Any:  # noqa: ARG002
        return await method(*args, **kw)


@dataclass(eq=False, repr=False)
class Retry(_Around):
    attempts: int = field(default=3, kw_only=True)
    time_limit: float | None = field(default=None, kw_only=True)
    retry_on: tuple[type[Exception], ...] = field(default=(UnavailableError,), kw_only=True)
    kind: ClassVar[str] = "retry"


@dataclass(eq=False, repr=False)
class Timeout(_Around):
    seconds: float = field(default=1.0, kw_only=True)
    kind: ClassVar[str] = "timeout"


@dataclass(eq=False, repr=False)
class Breaker(_Around):
    kind: ClassVar[str] = "circuit_breaker"


@dataclass(eq=False, repr=False)
class TheirCache(_Around):
    """A third party's, which only has the usual options."""

    ttl: float = field(kw_only=True)
    negative_ttl: float = field(kw_only=True)
    kind: ClassVar[str] = "cached"


@dataclass(eq=False, repr=False)
class Bulkhead(_Around):
    max_in_flight: int = field(default=64, kw_only=True)
    kind: ClassVar[str] = "bulkhead"


@dataclass(eq=False, repr=False)
class Metrics(_Around):
    kind: ClassVar[str] = "metrics"


@dataclass(eq=False, repr=False)
class Fallback(Layer):
    secondary: StateStore = field(kw_only=True)
    kind: ClassVar[str] = "fallback"

    def children(self) -> Mapping[str, StateStore]:
        return {"inner": self.inner, "secondary": self.secondary}


class _Backend(StateStore):
    kind = "other"

    def __init__(self, **options: Any) -> None:
        self.__dict__.update(options)

    async def upsert_latest(self, snapshot: StateSnapshot) -> None: ...

    async def get_latest(self, user_id: str) -> StateSnapshot | None: ...


class Redis(_Backend):
    kind = "redis"


class _Channel:
    """Something that offers an invalidation channel."""

    def attach(self, cache: object) -> None: ...

    def detach(self, cache: object) -> None: ...

    def key_of(self, user_id: str) -> bytes:
        return user_id.encode()

    def notice(self, notice: Notice) -> None: ...


class Coherent(Redis):
    def capability(self, kind: type[Any]) -> Any:
        return _Channel() if kind.__name__ == "Invalidations" else None


class Sql(_Backend):
    kind = "sql"


class Swallows(StateStore):
    """Wraps a store and forwards only what it must."""

    def __init__(self, inner: StateStore) -> None:
        self.inner = inner

    def children(self) -> Mapping[str, StateStore]:
        return {"inner": self.inner}

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        await self.inner.upsert_latest(snapshot)

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        return await self.inner.get_latest(user_id)


class Naps(Layer):
    """Whatever takes its seconds, they end no call."""

    seconds = 1.0


class Faults(Layer):
    injects_faults = True


def rules(*stacks: StateStore, **options: Any) -> set[str]:
    return {finding.rule for finding in lint(*stacks, **options)}


def _same() -> StateStore:
    one = Sql(timeout=1)
    return Fallback(one, secondary=one)


def _near_and_far() -> StateStore:
    return Fallback(Timeout(Sql(), seconds=0.1), secondary=Timeout(Sql(), seconds=1))


WRONG_AND_RIGHT: list[tuple[str, Callable[[], StateStore], Callable[[], StateStore]]] = [
    ("LS001", lambda: Retry(_Backend()), lambda: Retry(Timeout(_Backend()))),
    ("LS001", lambda: Retry(_Backend()), lambda: Retry(_Backend(time_limit=2.0))),
    ("LS001", lambda: Retry(_Backend(time_limit=True)), lambda: Retry(_Backend(timeout=1))),
    ("LS001", lambda: Retry(Naps(_Backend())), lambda: Retry(Timeout(Naps(_Backend())))),
    (
        "LS002",
        lambda: Timeout(Retry(Sql(timeout=1))),
        lambda: Timeout(Retry(Timeout(Sql())), seconds=9),
    ),
    (
        "LS003",
        lambda: Retry(Fallback(Sql(timeout=1), secondary=Sql(timeout=1))),
        lambda: Fallback(Retry(Sql(timeout=1)), secondary=Sql(timeout=1)),
    ),
    (
        "LS004",
        lambda: Retry(Redis(driver_retries=3, timeout=1)),
        lambda: Retry(Redis(driver_retries=0, timeout=1)),
    ),
    ("LS004", lambda: Retry(Redis(driver_retries=1, timeout=1)), lambda: Redis(driver_retries=1)),
    (
        "LS005",
        lambda: Retry(Breaker(Retry(Sql(timeout=1)))),
        lambda: Fallback(Retry(Sql(timeout=1)), secondary=Retry(Sql(timeout=1))),
    ),
    (
        "LS006",
        lambda: Retry(Breaker(Sql(timeout=1)), retry_on=(StoreError,)),
        lambda: Retry(Breaker(Sql(timeout=1))),
    ),
    (
        "LS007",
        lambda: Timeout(Retry(Timeout(Sql(), seconds=1), attempts=3), seconds=2),
        lambda: Timeout(Retry(Timeout(Sql(), seconds=1), attempts=3), seconds=3),
    ),
    (
        "LS007",
        lambda: Timeout(Retry(_near_and_far()), seconds=2),
        lambda: Timeout(Retry(_near_and_far(), time_limit=2), seconds=2),
    ),
    ("LS009", lambda: Cached(Redis(ttl=30), ttl=60), lambda: Cached(Redis(ttl=30), ttl=30)),
    ("LS011", lambda: Cached(Redis()), lambda: Cached(Coherent())),
    ("LS011", lambda: Cached(Coherent(), invalidation="off"), lambda: Cached(Sql())),
    (
        "LS013",
        lambda: WriteThrough(
            Redis(url="redis://a", prefix="p"), origin=Redis(url="redis://a", prefix="p")
        ),
        lambda: WriteThrough(
            Redis(url="redis://a", prefix="p"), origin=Redis(url="redis://a", prefix="q")
        ),
    ),
    ("LS017", lambda: Swallows(Sql()), lambda: Layer(Sql())),
    ("LS022", lambda: Cached(MemoryStore()), lambda: WriteThrough(MemoryStore(), origin=Sql())),
    (
        "LS022",
        lambda: Fallback(Sql(), secondary=MemoryStore()),
        lambda: Fallback(Sql(), secondary=Cached(WriteThrough(MemoryStore(), origin=Sql()))),
    ),
    ("LS023", lambda: Cached(Sql()), lambda: Metrics(Cached(Sql()))),
    ("LS023", lambda: Cached(Metrics(Sql())), lambda: Metrics(Cached(Metrics(Sql())))),
    ("LS023", lambda: Retry(Cached(Metrics(Sql()))), lambda: Retry(Metrics(Cached(Sql())))),
    ("LS023", lambda: Retry(Sql()), lambda: Retry(Metrics(Sql()))),
    ("LS023", lambda: Layer(Sql()), lambda: Sql()),
    ("LS025", _same, lambda: Fallback(Sql(), secondary=Sql())),
    (
        "LS026",
        lambda: Bulkhead(Sql(pool_size=5), max_in_flight=10),
        lambda: Bulkhead(Sql(pool_size=10), max_in_flight=10),
    ),
    ("LS027", lambda: Bulkhead(Cached(Sql())), lambda: Cached(Bulkhead(Sql()))),
    ("LS028", lambda: Faults(Sql()), lambda: Layer(Sql())),
    ("LS037", lambda: Retry(Cached(Sql(timeout=1))), lambda: Cached(Retry(Sql(timeout=1)))),
    ("LS038", lambda: Breaker(Retry(Sql(timeout=1))), lambda: Retry(Breaker(Sql(timeout=1)))),
    ("LS039", lambda: Cached(Sql()), lambda: Cached(Sql(), ttl_jitter=0.1)),
    ("LS040", lambda: Cached(Cached(Sql())), lambda: Cached(Sql())),
    ("LS041", lambda: Redis(), lambda: WriteThrough(Redis(), origin=Sql())),
    (
        "LS043",
        lambda: Redis(url="redis://u:***@h"),
        lambda: Redis(url="redis://u:s@h"),
    ),
    ("LS042", lambda: Redis(ttl=60), lambda: WriteThrough(Redis(ttl=60), origin=Sql())),
    ("LS050", lambda: _sealed(Compressed(Sql())), lambda: Compressed(_sealed(Sql()))),
    ("LS051", lambda: _sealed(Cached(Sql())), lambda: Cached(_sealed(Sql()))),
    (
        "LS052",
        lambda: WriteThrough(Redis(), origin=_sealed(Sql())),
        lambda: WriteThrough(MemoryStore(), origin=_sealed(Sql())),
    ),
    (
        "LS052",
        lambda: WriteThrough(_sealed(Redis()), origin=Sql()),
        lambda: WriteThrough(_sealed(Redis()), origin=_sealed(Sql())),
    ),
    (
        "LS053",
        lambda: _sealed(WriteThrough(Redis(), origin=Sql())),
        lambda: _sealed(WriteThrough(MemoryStore(), origin=Sql())),
    ),
    ("LS054", lambda: _sealed(Sql(), accept_plain=True), lambda: _sealed(Sql())),
    (
        "LS055",
        lambda: WriteThrough(Retry(ReadOnly(Redis(timeout=1))), origin=Sql()),
        lambda: ReadOnly(WriteThrough(Redis(), origin=ReadOnly(Sql()))),
    ),
    (
        "LS056",
        lambda: Shadow(Cached(Sql()), candidate=Sql()),
        lambda: Cached(Shadow(Sql(), candidate=MemoryStore())),
    ),
    (
        "LS057",
        lambda: WriteThrough(Redis(), origin=Ramp(Sql(), alternative=Sql())),
        lambda: Ramp(WriteThrough(Redis(), origin=Sql()), alternative=Sql()),
    ),
]


def _sealed(inner: StateStore, **options: Any) -> StateStore:
    return Encrypted(inner, keys=[bytes(32)], **options)


@pytest.mark.parametrize(("rule", "wrong", "right"), WRONG_AND_RIGHT)
def test_rule_tells_wrong_from_right(
    rule: str, wrong: Callable[[], StateStore], right: Callable[[], StateStore]
) -> None:
    """The rule finds the wrong stack, says why and where, and is silent about the right one."""
    (finding,) = [finding for finding in lint(wrong()) if finding.rule == rule][:1]
    assert finding.severity is RULES[rule].severity
    assert len(finding.reason) > 30
    assert "(" in finding.place
    assert rule not in rules(right())


def test_every_rule_is_tested() -> None:
    """No rule without a pair above, or a test of its own below."""
    assert {rule for rule, _, _ in WRONG_AND_RIGHT} | {"LS034"} == set(RULES)


def test_max_staleness() -> None:
    """LS034 compares what the caches may answer with the age that is stated as acceptable."""
    stack = Cached(Sql(), ttl=60, stale_if_error=300)
    assert "LS034" in rules(stack, max_staleness=100)
    assert "LS034" not in rules(stack, max_staleness=360)
    assert "LS034" not in rules(Sql(ttl=60, stale_if_error=300), max_staleness=10)  # no cache
    absent = Cached(MemoryStore(), ttl=5, negative_ttl=60)
    assert "LS034" in rules(absent, max_staleness=50)
    assert "LS034" not in rules(absent, max_staleness=60)
    assert "LS034" not in rules(stack)


def test_max_staleness_is_a_duration_as_any_other() -> None:
    """A timedelta says it too; what is none is refused, whatever stack is looked at."""
    stack = Cached(MemoryStore(), ttl=60)
    assert "LS034" in rules(stack, max_staleness=timedelta(seconds=59))
    assert "LS034" not in rules(stack, max_staleness=timedelta(minutes=1))
    for wrong in ("1m", float("nan"), -1, True):
        with pytest.raises(ConfigError, match="max_staleness: must be a finite") as caught:
            lint(MemoryStore(), max_staleness=wrong)  # type: ignore[arg-type, unused-ignore]
        assert (caught.value.option, caught.value.layer) == ("max_staleness", "lint")


def test_max_staleness_adds_up() -> None:
    """LS034 compares what ``describe`` says, which counts all caches on the way down."""
    two = Cached(Layer(Cached(Sql(), ttl=60)), ttl=60)
    assert "LS034" in rules(two, max_staleness=119)
    assert "LS034" not in rules(two, max_staleness=120)
    old = Cached(Cached(Sql(), ttl=60), ttl=60, stale_if_error=30)
    assert "LS034" in rules(old, max_staleness=149)
    assert "LS034" not in rules(old, max_staleness=150)
    theirs = TheirCache(Sql(), ttl=60, negative_ttl=90)
    assert "LS034" in rules(theirs, max_staleness=89)
    assert "LS034" not in rules(theirs, max_staleness=90)
    endless = WriteThrough(Redis(ttl=30), origin=Sql())
    for stack in (endless, Cached(endless, ttl=5)):
        (finding,) = [f for f in lint(stack, max_staleness=10**6) if f.rule == "LS034"]
        assert "no bound" in finding.reason
        assert "outermost" in finding.place
    assert "LS034" not in rules(endless)


def test_two_stacks_on_one_redis() -> None:
    """LS013 also compares several stacks, by server and database, not by how the URL is written."""
    one = Redis(url="redis://a", prefix="p")
    for url in ("redis://a", "redis://a:6379/0", "redis://user:pw@a?timeout=3", "rediss://A"):
        assert "LS013" in rules(one, Redis(url=url, prefix="p"))
    for url in ("redis://b", "redis://a:6380", "redis://a/1", "unix:///a", "redis+cluster://a,b"):
        assert "LS013" not in rules(one, Redis(url=url, prefix="p"))
    for base in ("redis://a", "redis://a/1", "unix:///a.sock", "redis+sentinel://a/service"):
        one = Redis(url=f"{base}?db=2", prefix="p")
        assert "LS013" in rules(one, Redis(url=f"{base}?timeout=3&db=2", prefix="p"))
        for url in (base, f"{base}?db=3"):
            assert "LS013" not in rules(one, Redis(url=url, prefix="p"))
    assert "LS013" in rules(Redis(url="redis://a/5?db=2"), Redis(url="redis://a/2"))
    assert "LS013" in rules(Redis(url="unix:///a?db=0"), Redis(url="unix:///a"))
    assert "LS013" not in rules(Redis(url="unix:///a"), Redis(url="unix:///b"))


def test_one_tier_of_one_system_of_record() -> None:
    """Stacks that share a tier and what it is a copy of do what a shared tier is for."""

    def stack(database: str) -> StateStore:
        return WriteThrough(Redis(url="redis://a", prefix="p"), origin=Sql(url=database, timeout=1))

    assert "LS013" not in rules(stack("sqlite:///a.db"), stack("sqlite:///a.db"))
    assert "LS013" in rules(stack("sqlite:///a.db"), stack("sqlite:///b.db"))


def test_one_tier_of_one_engine() -> None:
    """An engine that was passed in tells which system of record it is, as a URL does."""

    def stack(engine: Any) -> StateStore:
        return WriteThrough(RedisStore("redis://a"), origin=SQLStore(engine=engine))

    one, other = (create_async_engine(f"sqlite+aiosqlite:///{name}.db") for name in "ab")
    assert "LS013" not in rules(stack(one), stack(one))
    assert "LS013" in rules(stack(one), stack(other))


def test_a_block_is_judged_as_what_it_was_made_from() -> None:
    """Whatever it is called itself; else by the name of its class."""

    class Own(Redis):
        kind = "own"

    class RedisStore(StateStore):
        """A third party's, which says no kind."""

        upsert_latest, get_latest = _Backend.upsert_latest, _Backend.get_latest

    assert "LS041" in rules(Own())
    assert "LS041" in rules(RedisStore())


@pytest.mark.parametrize(
    ("size", "overflow", "told"), [(5, 0, True), (5, 5, False), (1, -1, False)]
)
def test_the_pool_of_an_engine_counts_with_its_overflow(
    size: int, overflow: int, told: bool
) -> None:
    """All of it, which may be without an end."""
    pool = {"poolclass": AsyncAdaptedQueuePool, "pool_size": size, "max_overflow": overflow}
    engine = create_async_engine("sqlite+aiosqlite:///a.db", **pool)
    stack = Bulkhead(SQLStore(engine=engine), max_in_flight=10)
    assert ("LS026" in rules(stack)) is told


def test_errors_come_first() -> None:
    """Findings are ordered by severity."""
    found = [finding.severity for finding in lint(Cached(Cached(Retry(_Backend()))))]
    assert found == sorted(found, key=list(Severity).index)
    assert found[0] is Severity.ERROR


CONFIG: dict[str, Any] = {
    "store": {"use": "memory", "layers": [{"use": "cached"}, {"use": "cached"}]}
}


def test_loading_warns() -> None:
    """A warning of the linter is a LintWarning at load_stack, unless the file allows the rule."""
    with pytest.warns(LintWarning, match="LS040"):
        load_stack(CONFIG)
    for allow in (["LS040"], {"LS040": "measured, and it is fine"}):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load_stack({**CONFIG, "lint": {"allow": allow}})


@pytest.mark.parametrize(
    ("limit", "warns"), [(0, True), ("4s", True), (5, False), ("5m", False)]
)
def test_loading_compares_with_the_staleness_that_the_file_accepts(
    limit: object, warns: bool
) -> None:
    """As a number of seconds or as text; a limit of 0 is one."""
    config = {
        "store": {"use": "memory", "layers": [{"use": "cached", "ttl": 5}]},
        "lint": {"max_staleness": limit},
    }
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        load_stack(config)
    assert any("LS034" in str(each.message) for each in told) == warns


def test_loading_refuses_errors_unless_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error refuses to build, with the rule's id; allowing the id builds it."""
    monkeypatch.setattr(Cached, "injects_faults", True, raising=False)
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    config = {"store": {"use": "memory", "layers": [{"use": "cached"}]}}
    with pytest.raises(ConfigError, match="LS028"):
        load_stack(config)
    assert load_stack({**config, "lint": {"allow": ["LS028", "LS022"]}})


def test_rules_for_tests_are_silent_in_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory as the system of record warns outside pytest, unless it was put there on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_stack({"use": "memory"})
        monkeypatch.delenv("PYTEST_CURRENT_TEST")
        load_stack({"use": "memory", "id": "db"}, overrides={"db": MemoryStore()})
    with pytest.warns(LintWarning, match="LS022"):
        load_stack({"use": "memory"})


@dataclass(eq=False, repr=False)
class Chaos(_Around):
    """A third party's block that says of itself that it injects faults."""

    injects_faults: ClassVar[bool] = True


class Pool:
    """An engine with a pool, as SQLAlchemy's."""

    def __init__(self, size: int, overflow: int) -> None:
        self.sync_engine = self.pool = self
        self._size, self._max_overflow = size, overflow

    def size(self) -> int:
        return self._size


def _with_engine(size: int, overflow: int) -> StateStore:
    store = Sql()
    store.engine = Pool(size, overflow)  # type: ignore[attr-defined]
    return store


def _reasons(stack: StateStore, **options: Any) -> dict[str, str]:
    return {finding.rule: finding.reason for finding in lint(stack, **options)}


def test_reasons_tell_the_numbers() -> None:
    """Those of the stack at hand, computed: attempts, seconds, connections."""
    driver = Sql(timeout=1)
    driver.driver_retries = 4  # type: ignore[attr-defined]
    for stack, rule, words in (
        (Timeout(Retry(Sql()), seconds=2), "LS002", "uses up the 2 s"),
        (Retry(driver, attempts=5), "LS004", "each call 4 times below Retry, up to 25 attempts"),
        (Retry(Retry(Sql(timeout=1), attempts=5), attempts=4), "LS005", "up to 20 of one call"),
        (
            Timeout(Retry(Timeout(Sql(), seconds=1), attempts=3), seconds=2),
            "LS007",
            "3 attempts of 1 s need 3 s, but the Timeout outside ends the call after 2 s",
        ),
        (
            Bulkhead(_with_engine(3, 4), max_in_flight=8),
            "LS026",
            "8 calls are let in but Sql has 7",
        ),
        (Cached(Redis(ttl=30), ttl=60), "LS009", "lives 60 s here but 30 s in Redis"),
        (Cached(Redis(), ttl=60), "LS011", "up to 60 s late"),
        (Cached(Cached(Sql(), ttl=7), ttl=5), "LS040", "may be 12 s old"),
        (Redis(ttl=30), "LS042", "not written for 30 s"),
    ):
        assert words in _reasons(stack).get(rule, f"{rule} is silent"), rule


def test_what_is_enough_is_not_complained_about() -> None:
    """The nearest stack that is right: limits, pools and blocks that only look like others."""
    for stack, rule in (
        (Retry(Sql(timeout=1)), "LS004"),
        (Bulkhead(_with_engine(3, 5), max_in_flight=8), "LS026"),
        (Bulkhead(_with_engine(3, -1), max_in_flight=8), "LS026"),
        (Timeout(Retry(Timeout(Sql(), seconds=3), attempts=3), seconds=3), "LS007"),
        (Retry(Sql(timeout=1), retry_on=(StoreError,)), "LS006"),
        (Retry(Sql(timeout=1)), "LS007"),
        (Cached(WriteThrough(MemoryStore(), origin=Sql())), "LS011"),
        (Cached(Sql()), "LS028"),
        (Sql(), "LS017"),
    ):
        assert rule not in _reasons(stack), rule
    assert "LS028" in _reasons(Chaos(Sql()))
    breaker = Breaker(Sql(timeout=1))
    one = Retry(breaker, retry_on=StoreError)  # type: ignore[arg-type]
    assert "LS006" in _reasons(one)
    for name in ("on", "retry_if"):
        odd = Retry(breaker)
        odd.retry_on = ()
        setattr(odd, name, [StoreError])
        assert "LS006" in _reasons(odd), name
        setattr(odd, name, ["text"])
        assert "LS006" not in _reasons(odd), name


def test_a_layer_that_hides_several_things_is_told_all() -> None:
    """By the names of the operations."""

    class Bare(StateStore):
        def __init__(self, inner: StateStore) -> None:
            self.inner = inner

        async def get_latest(self, user_id: str) -> StateSnapshot | None:
            return await self.inner.get_latest(user_id)

        async def upsert_latest(self, snapshot: StateSnapshot) -> None:
            await self.inner.upsert_latest(snapshot)

    class Some(Bare):
        async def delete(self, user_id: str) -> None:
            await self.inner.delete(user_id)

        async def health_check(self) -> bool:
            return await self.inner.health_check()

    assert "does not forward delete, get_history, health, so" in _reasons(Bare(Sql()))["LS017"]
    assert "does not forward get_history, so" in _reasons(Some(Sql()))["LS017"]
