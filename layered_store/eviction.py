"""S3-FIFO: which entries a full cache gives up.

New entries pass a short queue first and reach the main one only when they were asked for again, so
that a scan over many users does not push out those who come back. A hit costs one small counter.

Source: Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023.
"""

from __future__ import annotations

from collections import deque
from threading import Lock
from typing import TYPE_CHECKING, Any, Final

import msgspec
from cachetools import Cache

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

__all__ = ["Node", "S3FIFOCache"]

_SMALL_SHARE: Final = 0.1
"""Share of the entries that the queue of newcomers may hold (the paper's choice)."""

_MAX_FREQ: Final = 3
_SMALL, _MAIN, _GONE = 0, 1, 2
_NEVER: Final = float("inf")


class Node(msgspec.Struct, gc=False):
    """One entry of the cache. Untracked by the garbage collector: it is in no cycle.

    Args:
        key: what it is found by.
        value: what is kept.
        freq: hits since the eviction last looked, up to 3.
        queue: which queue it stands in.
    """

    key: Any
    value: Any
    freq: int = 0
    queue: int = _SMALL


class S3FIFOCache(Cache):  # type: ignore[type-arg]  # generic only in its stubs
    """A ``cachetools`` cache that evicts by S3-FIFO.

    Args:
        maxsize: how many entries it holds; at least 1.
        on_evict: called with each node that is evicted for lack of room.
    """

    def __init__(self, maxsize: int, on_evict: Callable[[Node], None] | None = None) -> None:
        super().__init__(maxsize)
        self._capacity = maxsize
        self.nodes: dict[Any, Node] = {}
        self._small: deque[Node] = deque()
        self._main: deque[Node] = deque()
        # Nodes that were taken out and are still in the queue.
        self._small_gone = 0
        # How many were given up for lack of room.
        self.evicted = 0
        self._small_limit = max(1, int(maxsize * _SMALL_SHARE))
        # Keys given up lately, and in which order; one that came back meanwhile may stand there
        # twice. (A plain dict takes ever longer to find its first key after many deletions.)
        self._ghosts: dict[Any, None] = {}
        self._ghost_order: deque[Any] = deque()
        self._ghost_limit = max(1, maxsize - self._small_limit)
        self.on_evict = on_evict
        self._lock = Lock()  # a cache may be shared by event loops of several threads

    def put(self, node: Node) -> None:
        """Insert a node, in place of the one with its key, evicting others when full."""
        with self._lock:
            self.insert(node)

    def insert(self, node: Node) -> None:
        """Do as ``put`` does, for an owner who has a lock of its own."""
        key, nodes = node.key, self.nodes
        if key in nodes:
            self._replace(nodes[key], node)
            return
        if len(nodes) >= self._capacity:
            self._evict()
        nodes[key] = node
        if key in self._ghosts:
            del self._ghosts[key]
            node.queue = _MAIN
            self._main.append(node)
        else:
            node.queue = _SMALL
            self._small.append(node)

    def _replace(self, old: Node, node: Node) -> None:
        """Put a newer value of a known user where the old one was, with its standing."""
        node.queue, node.freq = (_MAIN if old.freq else _SMALL), old.freq
        self.nodes[node.key] = node
        self._forget(old)
        (self._small if node.queue == _SMALL else self._main).append(node)

    def remove(self, key: Any) -> Node | None:
        """Take out the entry of ``key`` and return it; None when there is none."""
        if key not in self.nodes:
            return None
        with self._lock:
            node = self.nodes.pop(key, None)
            if node is not None:
                self._forget(node)
            return node

    def first_deadline(self) -> float:
        """Return the earliest ``deadline`` of the nodes at the heads of the queues now."""
        small, main = self._small, self._main
        first: float = small[0].deadline if small else _NEVER  # type: ignore[attr-defined]
        if main and main[0].deadline < first:  # type: ignore[attr-defined]
            first = main[0].deadline  # type: ignore[attr-defined]
        return first

    def oldest(self) -> Iterator[Node]:
        """Yield the nodes that stand at the head of the queues."""
        with self._lock:
            for queue, kind in ((self._small, _SMALL), (self._main, _MAIN)):
                while queue and queue[0].queue != kind:
                    queue.popleft()
                    self._small_gone -= kind == _SMALL
            heads = [queue[0] for queue in (self._small, self._main) if queue]
        yield from heads

    def _forget(self, node: Node) -> None:
        """Mark a node as gone; the queue passes over it later."""
        if node.queue == _SMALL:
            self._small_gone += 1
        node.queue = _GONE
        # Entries that come and go without ever filling the cache must not pile up here.
        if len(self._small) + len(self._main) > 2 * len(self.nodes) + 64:
            self._small = deque(n for n in self._small if n.queue == _SMALL)
            self._small_gone = 0
            self._main = deque(n for n in self._main if n.queue == _MAIN)

    def _evict(self) -> None:
        small = self._small
        if len(small) - self._small_gone >= self._small_limit or not self._main:
            while small:
                node = small.popleft()
                if node.queue != _SMALL:
                    self._small_gone -= 1
                elif node.freq:
                    node.freq = 0
                    node.queue = _MAIN
                    self._main.append(node)
                else:
                    self._ghosts[node.key] = None
                    self._ghost_order.append(node.key)
                    if len(self._ghost_order) > self._ghost_limit:
                        self._ghosts.pop(self._ghost_order.popleft(), None)
                    self._drop(node)
                    return
        self._evict_main()

    def _evict_main(self) -> None:
        main = self._main
        while main:
            node = main.popleft()
            if node.queue != _MAIN:
                continue
            if node.freq:
                node.freq -= 1
                main.append(node)
                continue
            self._drop(node)
            return
        self._evict()

    def _drop(self, node: Node) -> None:
        node.queue = _GONE
        del self.nodes[node.key]
        self.evicted += 1
        if self.on_evict is not None:
            self.on_evict(node)

    # The mapping that every cachetools cache is.

    def __getitem__(self, key: Hashable) -> Any:
        node = self.nodes.get(key)
        if node is None:
            return self.__missing__(key)
        if node.freq < _MAX_FREQ:
            node.freq += 1
        return node.value

    def __setitem__(self, key: Hashable, value: Any) -> None:
        self.put(Node(key, value))

    def __delitem__(self, key: Hashable) -> None:
        if self.remove(key) is None:
            raise KeyError(key)

    def __contains__(self, key: object) -> bool:
        return key in self.nodes

    def __iter__(self) -> Iterator[Any]:
        return iter(self.nodes)

    def __len__(self) -> int:
        return len(self.nodes)

    def __repr__(self) -> str:
        # Not the entries, as cachetools would: they are about users.
        return f"{type(self).__name__}(maxsize={self.maxsize}, currsize={self.currsize})"

    @property
    def currsize(self) -> int:
        return len(self.nodes)

    def popitem(self) -> tuple[Any, Any]:
        """Evict the entry that S3-FIFO would give up next; return its key and value."""
        evicted: list[Node] = []
        with self._lock:
            if not self.nodes:
                raise KeyError(f"{type(self).__name__} is empty")
            before, self.on_evict = self.on_evict, evicted.append
            try:
                self._evict()
            finally:
                self.on_evict = before
        return evicted[0].key, evicted[0].value

    def clear(self) -> None:
        with self._lock:
            for node in self.nodes.values():
                node.queue = _GONE
            self.nodes.clear()
            self._small.clear()
            self._main.clear()
            self._small_gone = 0
            self._ghosts.clear()
            self._ghost_order.clear()
