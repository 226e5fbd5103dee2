"""From a config file, or a dict, to a stack."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from layered_store.coherence.contract import Invalidations
from layered_store.config.dumping import MASK
from layered_store.config.environment import MAX_DEPTH, interpolate
from layered_store.config.files import read_file
from layered_store.config.filling import filled
from layered_store.config.registry import MISSING, Option, path_of, spec_of
from layered_store.config.values import converted, word
from layered_store.errors import ConfigError
from layered_store.interface import StateStore
from layered_store.options import nearest
from layered_store.stack import take_id

if TYPE_CHECKING:
    from layered_store.config.lint import LintPolicy
    from layered_store.config.registry import BlockSpec
    from layered_store.snapshot import StateSnapshot

__all__ = ["load_stack"]

_TOP: Final = ("store", "lint")
_OWN: Final = ("use", "id", "layers")
"""Keys of a table that are no options of its block."""


def load_stack(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    overrides: Mapping[str, StateStore] | None = None,
    environ: Mapping[str, str] | None = None,
) -> StateStore:
    """Build the stack that a config file or dict describes; opens no connection.

    Args:
        source: the path of a ``.toml`` or ``.json`` file, or what such a file holds. A dict may
            also be the table of the outermost block itself.
        overrides: stores by the ``id`` of the block whose place they take; a layer's place includes
            what it wraps. The replaced block is not built, and its ``id`` goes to what stands there
            instead, unless that has one.
        environ: where ``${NAME}`` comes from; the process environment unless given.

    Returns:
        the outermost block.

    Raises:
        ConfigError: something is wrong; when several things are, ``problems`` has them all. Each
            has its dotted ``path``, and no text shows a value of the file or the environment.

    Warns:
        LintWarning: for each warning of :func:`layered_store.lint` that the file does not allow.
    """
    from layered_store.config.lint import enforce  # noqa: PLC0415

    stack, policy = load_unchecked(source, overrides=overrides, environ=environ)
    for name, store in (overrides or {}).items():
        take_id(store, name)
    for finding in enforce(stack, policy, replaced=list((overrides or {}).values())):
        warnings.warn(finding, stacklevel=2)
    return stack


def load_unchecked(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    overrides: Mapping[str, StateStore] | None = None,
    environ: Mapping[str, str] | None = None,
) -> tuple[StateStore, LintPolicy]:
    """Build a stack as :func:`load_stack` does, without asking the linter.

    Returns:
        the stack, and what the file says about the linter.
    """
    from layered_store.config.lint import LintPolicy  # noqa: PLC0415

    if isinstance(source, Mapping):
        document = {"store": source} if "use" in source else dict(source)
    elif isinstance(source, str | os.PathLike):
        document = read_file(Path(source))
    else:
        raise ConfigError(f"must be a path or a dict, not {type(source).__name__}", option="source")
    if not isinstance(overrides or {}, Mapping):
        raise ConfigError(
            f"must be a dict of stores by id, not {type(overrides).__name__}", option="overrides"
        )
    document.pop("$schema", None)
    build = _Build(dict(overrides or {}), os.environ if environ is None else environ)
    build.check_keys(document, _TOP, "")
    stack = None
    if "store" not in document:
        build.problem("has no [store] table; it holds the outermost block", path="store")
    else:
        stack = build.block(document["store"], "store", 0)
    build.check_overrides()
    policy = build.guarded(LintPolicy.from_config, document.get("lint", {}))
    build.finish()
    assert stack is not None
    assert isinstance(policy, LintPolicy)
    return stack, policy


class _StandIn(StateStore):
    """In place of a block that could not be built, so that those around it are checked too."""

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:  # noqa: ARG002
        raise AssertionError

    async def get_latest(self, user_id: str) -> StateSnapshot | None:  # noqa: ARG002
        raise AssertionError

    def capability(self, kind: type[Any]) -> Any:
        # It might have had a channel: whether one is missing cannot be told.
        return _Anything() if kind is Invalidations else None


class _Anything:
    def __getattr__(self, name: str) -> Any:
        return lambda *_: b""


class _Build:
    """One reading of one config, collecting what is wrong with it."""

    def __init__(self, overrides: dict[str, StateStore], environ: Mapping[str, str]) -> None:
        self.overrides = overrides
        self._environ = environ
        self._problems: list[ConfigError] = []
        self._ids: dict[str, str] = {}
        self._above: list[int] = []

    def problem(self, message: str, *, path: str, suggestion: str | None = None) -> None:
        self._problems.append(ConfigError(message, path=path, suggestion=suggestion))

    def guarded(self, step: Any, *args: Any) -> Any:
        """Run one step; keep its ConfigError as a problem and return None."""
        try:
            return step(*args)
        except ConfigError as exc:
            self._problems.extend(exc.problems or (exc,))
            return None

    def finish(self) -> None:
        for problem in self._problems:
            # What a driver said, and the frames it said it in, may hold a secret.
            problem.__cause__ = problem.__context__ = problem.__traceback__ = None
        if len(self._problems) == 1:
            raise self._problems[0]
        if self._problems:
            raise ConfigError(
                f"{len(self._problems)} problems in this configuration:",
                path=self._problems[0].path,
                suggestion=self._problems[0].suggestion,
                option=self._problems[0].option,
                problems=self._problems,
            )

    def check_keys(self, table: Mapping[Any, Any], known: Any, path: str) -> None:
        for key in table:
            if key not in known:
                self.problem(
                    f"unknown key; known are {', '.join(known)}",
                    path=path_of(path, key),
                    suggestion=nearest(str(key), known),
                )

    def check_overrides(self) -> None:
        for name, store in self.overrides.items():
            if not isinstance(store, StateStore):
                what = type(store).__name__
                if isinstance(store, type):
                    what = f"the class {store.__name__}; pass an instance"
                self.problem(f"must be a StateStore, not {what}", path=f"overrides.{name}")
            if name not in self._ids:
                known = ", ".join(sorted(self._ids)) or "none"
                self.problem(
                    f"no block has this id; ids of this configuration: {known}",
                    path=f"overrides.{name}",
                    suggestion=nearest(str(name), self._ids),
                )

    def block(self, table: Any, path: str, depth: int) -> StateStore:
        """Return the block that a table describes, with its ``layers`` around it."""
        if not isinstance(table, Mapping):
            way = "; pass it with overrides={id: block}" if isinstance(table, StateStore) else ""
            self.problem(f"must be a table with a key 'use', not {word(table)}{way}", path=path)
            return _StandIn()
        if depth > MAX_DEPTH or id(table) in self._above:
            reason = "contains itself" if depth <= MAX_DEPTH else f"more than {MAX_DEPTH} deep"
            self.problem(f"the blocks are nested without end ({reason})", path=path)
            return _StandIn()
        self._above.append(id(table))
        try:
            entries = self._layer_entries(table, path)
            # An override stands for all that its block wraps: of that nothing is read.
            ways = [*entries, (table, path)]
            end = next((i for i, way in enumerate(ways) if self._override(way[0])), len(entries))
            end_table, end_path = ways[end]
            entries = entries[:end]
            # Read from the outside in, so that problems come in the file's order.
            plans = [self._plan(entry, place, is_layer=True) for entry, place in entries]
            store = self._override(end_table)
            if store is not None:
                self._note_id(end_table, end_path)
            else:
                store = self._make(self._plan(table, path, is_layer=False), table, path, depth)
            for (entry, place), plan in zip(reversed(entries), reversed(plans), strict=True):
                store = self._wrap(plan, entry, place, depth, store)
            return store
        finally:
            self._above.pop()

    def _layer_entries(self, table: Mapping[str, Any], path: str) -> list[tuple[Any, str]]:
        entries = table.get("layers", [])
        if not isinstance(entries, list | tuple):
            self.problem(
                f"must be a list of tables, outermost first, not {word(entries)}",
                path=f"{path}.layers",
            )
            return []
        found = []
        for index, entry in enumerate(entries):
            place = f"{path}.layers.{index}"
            if not isinstance(entry, Mapping):
                self.problem(f"must be a table with a key 'use', not {word(entry)}", path=place)
            elif id(entry) in self._above:
                self.problem("the blocks are nested without end (contains itself)", path=place)
            else:
                found.append((entry, place))
        return found

    def _override(self, table: Any) -> StateStore | None:
        name = table.get("id") if isinstance(table, Mapping) else None
        if not isinstance(name, str):
            return None
        try:
            found = self.overrides.get(interpolate(name, self._environ))
        except ConfigError:
            return None  # it is told where the id is noted
        return found if isinstance(found, StateStore) else None

    def _note_id(self, table: Mapping[str, Any], path: str) -> str | None:
        name = table.get("id")
        if name is None:
            return None
        if isinstance(name, str) and name:
            name = self._name(name, f"{path}.id")
            if name is None:
                return None
        if not isinstance(name, str) or not name:
            self.problem(f"must be a name, not {word(name)}", path=f"{path}.id")
            return None
        if name in self._ids:
            self.problem(
                f"this id is already that of {self._ids[name]}; ids are unique", path=f"{path}.id"
            )
            return None
        self._ids[name] = path
        return name

    def _plan(self, table: Mapping[str, Any], path: str, *, is_layer: bool) -> BlockSpec | None:
        """Return the spec of the block a table names, once its keys are known to be right."""
        if "use" not in table:
            self.problem("has no key 'use', which names the block", path=path)
            return None
        kind = table["use"]
        if not isinstance(kind, str):
            self.problem(f"must be the name of a block, not {word(kind)}", path=f"{path}.use")
            return None
        kind = self._name(kind, f"{path}.use")
        if kind is None:
            return None
        try:
            spec = spec_of(kind)
        except ConfigError as exc:
            exc.path = f"{path}.use"
            self._problems.append(exc)
            return None
        if is_layer and not spec.is_layer:
            self.problem(
                f"{kind} wraps nothing, so it cannot stand in 'layers'; it is an end of a stack",
                path=f"{path}.use",
            )
            return None
        if is_layer and "inner" in table:
            self.problem(
                "what a layer in 'layers' wraps is the rest of the list; leave 'inner' out",
                path=f"{path}.inner",
            )
        own = _OWN[:2] if is_layer else _OWN
        names = [
            option.name for option in spec.options if not (is_layer and option.name == "inner")
        ]
        for key in table:
            if key in own or key in names or (key == "inner" and is_layer):
                continue
            if key == "layers":
                self.problem("a layer in 'layers' has none of its own", path=f"{path}.layers")
                continue
            known = [*own, *(o.name for o in spec.options if o.name in names and o.from_file)]
            self.problem(
                f"{kind} has no option of this name; it has {', '.join(known)}",
                path=path_of(path, key),
                suggestion=nearest(str(key), known),
            )
        return spec

    def _wrap(
        self,
        spec: BlockSpec | None,
        entry: Mapping[str, Any],
        path: str,
        depth: int,
        inner: StateStore,
    ) -> StateStore:
        if spec is None:
            self._note_id(entry, path)
            return inner if isinstance(inner, _StandIn) else _StandIn()
        return self._make(spec, entry, path, depth, inner)

    def _make(
        self,
        spec: BlockSpec | None,
        table: Mapping[str, Any],
        path: str,
        depth: int,
        inner: StateStore | None = None,
    ) -> StateStore:
        """Return the block, or a stand-in when it cannot be built."""
        name = self._note_id(table, path)
        if spec is None:
            # The tables below are read all the same, to report what is wrong in them too.
            for key, value in table.items():
                if isinstance(value, Mapping) and "use" in value:
                    self.block(value, path_of(path, key), depth + 1)
            return _StandIn()
        before = len(self._problems)
        # One mistake is one problem: an option that is misspelt is not reported as missing too.
        unknown = [str(key) for key in table if key not in _OWN and spec.option(str(key)) is None]
        misspelt = {nearest(key, [option.name for option in spec.options]) for key in unknown}
        arguments: dict[str, Any] = {} if inner is None else {"inner": inner}
        for option in spec.options:
            if option.name in arguments:
                continue
            if option.name in table:
                place = f"{path}.{option.name}"
                if option.store:
                    arguments[option.name] = self.block(table[option.name], place, depth + 1)
                    continue
                value = self._value(option, table[option.name], place)
                if value is not MISSING:
                    arguments[option.name] = value
            elif option.required and option.name not in misspelt:
                what = "the store it wraps" if option.name == "inner" else option.doc
                self.problem(
                    f"{spec.kind} needs this option" + (f": {what}" if what else ""),
                    path=f"{path}.{option.name}",
                )
        broken = len(self._problems) > before
        store = self._construct(spec, arguments, table, path, misspelt, broken=broken)
        if store is None:
            return _StandIn()
        if name is not None:
            store.__dict__["block_id"] = name
        return store

    def _construct(
        self,
        spec: BlockSpec,
        arguments: dict[str, Any],
        table: Mapping[str, Any],
        path: str,
        misspelt: Collection[str | None],
        *,
        broken: bool,
    ) -> StateStore | None:
        """Call the constructor; again without each option that it refuses, to report them all."""
        while True:
            if any(o.required and o.name not in arguments for o in spec.options):
                return None
            try:
                store: StateStore = spec.cls(**arguments)
            except ConfigError as exc:
                option = exc.option
                if option not in arguments and (broken or option in misspelt):
                    return None  # what is left out may be the reason
                if exc.path is not None:  # of a table within the option
                    for problem in exc.problems or (exc,):
                        problem.path = f"{path}.{problem.path}"
                elif option in table:
                    exc.path = f"{path}.{option}"
                else:
                    exc.path = path
                    if option is not None:
                        exc.message = f"{option}: {exc.message}"
                self._problems.extend(exc.problems or (exc,))
                if option not in arguments or isinstance(arguments[option], StateStore):
                    return None
                del arguments[option]
                broken = True
            except ModuleNotFoundError as exc:
                self.problem(f"{spec.kind} needs {exc.name}, which is not installed", path=path)
                return None
            except Exception as exc:  # noqa: BLE001  a third party's constructor may raise anything
                # Its text may quote a secret, so only the kind of error is told.
                self.problem(
                    f"{spec.kind} cannot be built with these options ({type(exc).__name__})",
                    path=path,
                )
                return None
            else:
                return None if broken else store

    def _name(self, text: str, path: str) -> str | None:
        """Return a name with its variables filled in, or None with a problem."""
        try:
            return interpolate(text, self._environ)
        except ConfigError as exc:
            exc.path = path
            self._problems.append(exc)
            return None

    def _value(self, option: Option, value: Any, path: str) -> Any:
        """Return what the constructor gets for a value of the file, or MISSING with a problem."""
        if not option.from_file:
            self.problem(
                "takes an object, which a file cannot hold; build this block in code and pass it"
                " with overrides={id: block}",
                path=path,
            )
            return MISSING
        try:
            told = filled(option, value, self._environ, path)
        except ConfigError as exc:
            exc.path = exc.path or path
            self._problems.append(exc)
            return MISSING
        if told == MASK:
            self.problem(
                "is the mask that stands for a secret, not the secret; write ${NAME} and set the"
                " environment variable",
                path=path,
            )
            return MISSING
        try:
            return converted(option, told)
        except (ValueError, ImportError, AttributeError) as exc:
            self.problem(str(exc), path=path)
            return MISSING
