"""Multiprocess mode in one process and its forks: what is handed over, and when."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

COMMON = """
import asyncio, gc, os, sys
from prometheus_client.parser import text_string_to_metric_families as parse
from layered_store import Cached, MemoryStore, Metrics, StateSnapshot
from layered_store.metrics import multiprocess
from layered_store.metrics.prometheus import exposition

multiprocess._FLUSH_SECONDS = 1e6  # so that only the moment under test hands over

def figures(name):
    return {
        tuple(sample.labels.values()): sample.value
        for family in parse(exposition()[0].decode())
        for sample in family.samples if sample.name == "layered_store_" + name
    }

def calls(operation):
    counted = figures("operations_total")
    return sum(value for labels, value in counted.items() if operation in labels)

def one(figure):
    (value,) = figure.values()
    return value

async def use(stack, calls):
    await stack.upsert_latest(StateSnapshot("u-1"))
    for _ in range(calls):
        await stack.get_latest("u-1")
"""


def run(script: str, folder: Path | None) -> str:
    """Run a script in a process of its own; returns what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PROMETHEUS_MULTIPROC_DIR", None)
    if folder is not None:
        environment["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
    done = subprocess.run(
        [sys.executable, "-c", COMMON + textwrap.dedent(script)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nothing_is_added_to_a_call(tmp_path: Path) -> None:
    """The client's values are touched when somebody looks, not when somebody calls."""
    run(
        """
        from prometheus_client import values
        touched = 0
        for method in ("inc", "set"):
            def counted(self, *args, _real=getattr(values.ValueClass, method)):
                global touched
                touched += 1
                return _real(self, *args)
            setattr(values.ValueClass, method, counted)
        stack = Metrics(Cached(MemoryStore()), name="s")
        asyncio.run(use(stack, 5_000))
        assert touched == 0, touched
        assert calls("get_latest") == 5_000
        assert touched > 0
        """,
        tmp_path,
    )


def test_stacks_of_one_name_add_up_and_closing_one_loses_and_doubles_nothing(
    tmp_path: Path,
) -> None:
    """Counters stay, the gauges of what was closed come to rest."""
    run(
        """
        async def main():
            one_, two = (Metrics(Cached(MemoryStore()), name="s") for _ in range(2))
            await use(one_, 10)
            await use(two, 20)
            assert calls("get_latest") == 30, calls("get_latest")
            assert one(figures("cache_entries")) == 2, figures("cache_entries")
            await one_.health_report()
            assert set(figures("health_status").values()) == {2}
            await use(one_, 5)
            await one_.aclose()
            assert calls("get_latest") == 35, calls("get_latest")
            assert one(figures("cache_entries")) == 1, figures("cache_entries")
            await use(two, 7)
            assert calls("get_latest") == 42, calls("get_latest")
            await two.aclose()
            assert calls("get_latest") == 42, calls("get_latest")
            assert one(figures("cache_entries")) == 0, figures("cache_entries")
            assert set(figures("health_status").values()) == {2}, figures("health_status")
            three = Metrics(Cached(MemoryStore()), name="s")
            await use(three, 1)
            assert calls("get_latest") == 43, calls("get_latest")
            count = figures("operation_duration_seconds_count")
            assert sum(v for k, v in count.items() if "get_latest" in k) == 43, count
        asyncio.run(main())
        """,
        tmp_path,
    )


def test_what_is_handed_over_is_what_was_counted_and_closing_does_it(tmp_path: Path) -> None:
    """Seconds too, and what did not come about is 0; a closed stack is not unhealthy."""
    run(
        """
        from layered_store.testing import Faults

        def written(name):
            return {
                tuple(sample.labels.values()): sample.value
                for family in multiprocess.AllProcesses().collect()
                for sample in family.samples if sample.name == "layered_store_" + name
            }

        async def main():
            faults = Faults(MemoryStore())
            stack = Metrics(Cached(faults), name="s")
            for number, counted in ((3, [1, 3]), (5, [2, 8])):
                await use(stack, number)
                done = [value for value in figures("operations_total").values() if value]
                assert sorted(done) == counted, done
                assert set(figures("read_waits_total").values()) == {0}
                sums = figures("operation_duration_seconds_sum")
                for operation, (_, seconds) in stack.durations():
                    (shown,) = [v for k, v in sums.items() if operation in k] or [0.0]
                    assert abs(shown - seconds) < 1e-9, (operation, shown, seconds)
            faults.outage()
            await stack.health_report()
            assert 0 in figures("health_status").values()
            faults.recover()
            await stack.get_latest("u-1")
            await stack.aclose()
            assert set(written("health_status").values()) == {2}, written("health_status")
            gets = [v for k, v in written("operations_total").items() if "get_latest" in k]
            assert sum(gets) == 9, gets
        asyncio.run(main())
        """,
        tmp_path,
    )


def test_a_view_inside_another_of_the_same_name_counts_nothing_twice(tmp_path: Path) -> None:
    """Not at a scrape and not when both are closed."""
    run(
        """
        async def main():
            stack = Metrics(Cached(Metrics(MemoryStore(), name="s")), name="s")
            await use(stack, 5)
            await stack.get_latest("nobody")
            assert calls("get_latest") == 6, calls("get_latest")
            await stack.aclose()
            await stack.aclose()
            assert calls("get_latest") == 6, calls("get_latest")
        asyncio.run(main())
        """,
        tmp_path,
    )


def test_a_stack_that_is_gone_leaves_its_counters(tmp_path: Path) -> None:
    """And its successor of the same name is counted from the start."""
    run(
        """
        def life(number):
            stack = Metrics(Cached(MemoryStore()), name="s")
            asyncio.run(use(stack, number))
            figures("operations_total")
        for number in (10, 3):
            life(number)
            gc.collect()
        assert calls("get_latest") == 13, calls("get_latest")
        assert one(figures("cache_entries")) == 0
        """,
        tmp_path,
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_a_stack_built_before_the_fork_counts_each_call_once(tmp_path: Path) -> None:
    """As with a preloaded application: parent and children add up."""
    run(
        """
        stack = Metrics(Cached(MemoryStore()), name="s")
        asyncio.run(use(stack, 100))
        figures("operations_total")
        children = []
        done, go = os.pipe(), os.pipe()
        for number in range(3):
            pid = os.fork()
            if not pid:
                asyncio.run(use(stack, 10))
                stack._exporter.flush()
                os.write(done[1], b".")
                os.read(go[0], 1)
                os._exit(0)
            children.append(pid)
        for pid in children:
            os.read(done[0], 1)
        assert one(figures("cache_entries")) == 4, figures("cache_entries")
        os.write(go[1], b"...")
        for pid in children:
            os.waitpid(pid, 0)
        assert calls("get_latest") == 130, calls("get_latest")
        assert one(figures("cache_entries")) == 1  # of the processes that live
        """,
        tmp_path,
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_a_stack_that_was_closed_before_the_fork_is_at_rest_in_the_child(tmp_path: Path) -> None:
    """A preloading server that tried its stack and closed it has no unhealthy workers."""
    run(
        """
        async def tried():
            async with Metrics(Cached(MemoryStore()), name="s") as stack:
                await use(stack, 1)
                await stack.health_report()
                assert set(figures("health_status").values()) == {2}
        asyncio.run(tried())
        stack = Metrics(Cached(MemoryStore()), name="other")
        asyncio.run(stack.health_report())
        done, go = os.pipe(), os.pipe()
        pid = os.fork()
        if not pid:
            os.close(go[1])
            stack._exporter.flush()
            os.write(done[1], b".")
            os.read(go[0], 1)
            os._exit(0)
        os.read(done[0], 1)
        assert set(figures("health_status").values()) == {2}, figures("health_status")
        assert set(figures("cache_entries").values()) == {0}, figures("cache_entries")
        os.write(go[1], b".")
        os.waitpid(pid, 0)
        """,
        tmp_path,
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_an_old_health_check_of_one_process_counts_no_more_beside_a_new_one(
    tmp_path: Path,
) -> None:
    """A worker that was asked once, in an outage, does not say for ever that it goes on."""
    run(
        """
        from layered_store.testing import Faults, FakeClock
        clock, faults = FakeClock(), Faults(MemoryStore())
        stack = Metrics(faults, name="s", clock=clock)
        asked, go = os.pipe(), os.pipe()

        def child():
            os.close(go[1])
            faults.outage()
            asyncio.run(stack.health_report())
            for seconds in (0, 299, 2):
                clock.set(clock.monotonic() + seconds)
                stack._exporter.flush()
                os.write(asked[1], b".")
                os.read(go[0], 1)
            asyncio.run(stack.health_report())
            stack._exporter.flush()
            os.write(asked[1], b".")
            os.read(go[0], 1)

        pid = os.fork()
        if not pid:
            try:
                child()
            finally:
                os._exit(0)
        asyncio.run(stack.health_report())

        def shown(seconds):
            os.read(asked[0], 1)
            clock.set(clock.monotonic() + seconds)
            asyncio.run(stack.health_report())
            level = figures("health_status")["0.metrics", "s"]
            os.write(go[1], b".")
            return level

        assert shown(0) == 0  # the worst one
        assert shown(301) == 0  # the child's clock says that it is young enough
        assert shown(0) == 2
        assert shown(0) == 0  # a new check counts again
        os.waitpid(pid, 0)
        """,
        tmp_path,
    )


def test_the_last_health_check_counts_however_old_it_is(tmp_path: Path) -> None:
    """As long as nobody knows better: the stack is not well since nobody asks any more."""
    run(
        """
        from layered_store.testing import Faults, FakeClock
        async def main():
            clock, faults = FakeClock(), Faults(MemoryStore())
            stack = Metrics(faults, name="s", clock=clock)
            other = Metrics(MemoryStore(), name="other", clock=clock)
            faults.outage()
            await stack.health_report()
            clock.set(100_000)
            await other.health_report()
            assert figures("health_status")["0.metrics", "s"] == 0
            assert figures("health_status")["0.metrics", "s"] == 0
        asyncio.run(main())
        """,
        tmp_path,
    )


def test_a_process_hands_over_at_its_end(tmp_path: Path) -> None:
    """What was counted since the last second is not lost; its gauges go."""
    run(
        """
        stack = Metrics(Cached(MemoryStore()), name="s")
        asyncio.run(use(stack, 12))
        """,
        tmp_path,
    )
    assert not list(tmp_path.glob("gauge_*"))
    run(
        """
        assert calls("get_latest") == 12, calls("get_latest")
        """,
        tmp_path,
    )


def test_a_missing_folder_is_a_mistake_that_is_named(tmp_path: Path) -> None:
    """At once, not when the first figure is written."""
    run(
        """
        from layered_store import ConfigError
        from prometheus_client import CollectorRegistry
        registry = CollectorRegistry()
        try:
            Metrics(MemoryStore(), name="s", registry=registry)
        except ConfigError as exc:
            assert "PROMETHEUS_MULTIPROC_DIR" in str(exc)
        else:
            raise AssertionError("accepted")
        assert not registry._collector_to_names
        """,
        tmp_path / "missing",
    )


def test_a_variable_that_comes_too_late_changes_nothing(tmp_path: Path) -> None:
    """The client decides when it is imported; figures are then those of this process."""
    run(
        f"""
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = {str(tmp_path)!r}
        stack = Metrics(Cached(MemoryStore()), name="s")
        asyncio.run(use(stack, 4))
        assert calls("get_latest") == 4, calls("get_latest")
        """,
        None,
    )


def test_a_child_begins_where_its_parent_stood(tmp_path: Path) -> None:
    """What the parent has still to hand over is not handed over by its child as well."""
    run(
        """
        import threading
        async def main():
            stack = Metrics(Cached(MemoryStore()), name="s")
            await use(stack, 100)
            await stack.health_report()
            before = stack.durations()
            before = {operation: seconds for operation, (_, seconds) in before}
            assert before["get_latest"] > 0
            stack._exporter._forked()  # as in the child, whose files are its own
            names = [thread.name for thread in threading.enumerate()]
            assert names.count("layered_store-metrics") == 2, names  # a fork has no other threads
            assert calls("get_latest") == 0, calls("get_latest")
            assert one(figures("cache_entries")) == 1, figures("cache_entries")
            await use(stack, 10)
            assert calls("get_latest") == 10, calls("get_latest")
            for part in ("count", "bucket"):
                counted = figures("operation_duration_seconds_" + part)
                most = max(v for k, v in counted.items() if "get_latest" in k)
                assert most == 10, counted
            seconds = figures("operation_duration_seconds_sum")
            (counted,) = (v for k, v in seconds.items() if "get_latest" in k)
            own = dict(stack.durations())["get_latest"][1] - before["get_latest"]
            assert abs(counted - own) < 1e-9, (counted, own)
        asyncio.run(main())
        """,
        tmp_path,
    )


def test_nobody_needs_to_look_and_a_full_disk_is_waited_for(tmp_path: Path) -> None:
    """Others see what this process counted within the interval; a failure is logged, no more."""
    run(
        """
        import logging, time
        multiprocess._FLUSH_SECONDS = 0.01
        heard = []
        handler = logging.Handler()
        handler.emit = lambda record: heard.append(record.getMessage())
        logging.getLogger("layered_store").addHandler(handler)
        stack = Metrics(MemoryStore(), name="s")
        exporter, full = stack._exporter, [True]
        real = exporter.flush
        def flush():
            if full:
                raise OSError("no space left in /marked-folder")
            real()
        exporter.flush = flush
        asyncio.run(use(stack, 7))
        def written():
            return sum(
                sample.value for family in multiprocess.AllProcesses().collect()
                for sample in family.samples
                if sample.name == "layered_store_operations_total"
                and sample.labels["operation"] == "get_latest"
            )
        end = time.monotonic() + 20
        while not heard and time.monotonic() < end:
            time.sleep(0.01)
        assert len(heard) == 1 and "OSError" in heard[0], heard
        assert "marked-folder" not in heard[0], heard
        assert written() == 0
        full.clear()
        while written() != 7 and time.monotonic() < end:
            time.sleep(0.01)
        assert written() == 7
        assert len(heard) == 1, heard
        """,
        tmp_path,
    )


def test_no_fork_in_the_midst_of_a_hand_over(tmp_path: Path) -> None:
    """The client's own lock is held then, and the child would wait for it for ever."""
    run(
        """
        import threading, time
        stack = Metrics(MemoryStore(), name="s")
        asyncio.run(use(stack, 1))
        exporter, entered, inside = stack._exporter, threading.Event(), []
        real = exporter._flush
        def slow():
            inside.append(True)
            entered.set()
            time.sleep(0.2)
            real()
            inside.clear()
        exporter._flush = slow
        thread = threading.Thread(target=exporter.flush)
        thread.start()
        entered.wait()
        child = os.fork()
        if not child:
            if inside:
                os._exit(3)
            exporter._flush = real
            exporter.flush()
            if not os.fork():
                exporter.flush()
                os._exit(0)
            os._exit(os.waitstatus_to_exitcode(os.wait()[1]))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        thread.join()
        """,
        tmp_path,
    )


def test_a_file_that_cannot_be_read_takes_no_others_with_it(tmp_path: Path) -> None:
    """Left by another version of the client, or two containers with one folder: told once."""
    used = (96).to_bytes(8, "little")
    (tmp_path / "counter_1.db").write_bytes(used + (16).to_bytes(4, "little") + b"\xf0" * 84)
    (tmp_path / "histogram_1.db").write_bytes(used + (16).to_bytes(4, "little") + b"no json." * 11)
    (tmp_path / "gauge_livesum_1.db").write_bytes(b"abc")
    run(
        """
        import logging
        heard = []
        handler = logging.Handler()
        handler.emit = lambda record: heard.append(record.getMessage())
        logging.getLogger("layered_store").addHandler(handler)
        stack = Metrics(MemoryStore(), name="s")
        asyncio.run(use(stack, 2))
        assert calls("get_latest") == calls("get_latest") == 2
        assert len(heard) == 3, heard
        assert any("counter_1.db" in text for text in heard), heard
        """,
        tmp_path,
    )


def test_a_process_that_has_only_begun_is_no_error(tmp_path: Path) -> None:
    """A file that is empty yet, or for ever since its process died, is passed over."""
    for name in ("counter_1.db", "gauge_livesum_1.db", "histogram_1.db"):
        (tmp_path / name).touch()
    run(
        """
        stack = Metrics(MemoryStore(), name="s")
        asyncio.run(use(stack, 3))
        assert calls("get_latest") == 3
        """,
        tmp_path,
    )


def test_only_gauges_of_processes_that_are_gone_are_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those of this one, of a number that is none, nor counters; files of others stay."""
    from layered_store.metrics.multiprocess import _forget_dead_processes

    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    stays = [
        f"gauge_livesum_{os.getpid()}.db",
        "gauge_livesum_other.db",
        "gauge_livesum_99999999999999999999999.db",
        f"counter_{gone.pid}.db",
        f"gauge_all_{gone.pid}.db",
    ]
    for name in (*stays, f"gauge_livesum_{gone.pid}.db", f"gauge_livemin_{gone.pid}.db"):
        (tmp_path / name).touch()
    _forget_dead_processes()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(stays)
