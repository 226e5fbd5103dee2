"""The JSON Schema of config files, made from the same options that the loader reads."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from layered_store.config.durations import DURATION_PATTERN
from layered_store.config.lint import RULES
from layered_store.config.registry import MISSING, kinds, spec_of
from layered_store.errors import ConfigError

if TYPE_CHECKING:
    from layered_store.config.registry import BlockSpec, Option

__all__ = ["json_schema"]

_VARIABLE: Final = {"type": "string", "pattern": r"\$\{[A-Za-z_][A-Za-z0-9_]*(:-[^}]*)?\}"}
_JSON: Final = {str: "string", bool: "boolean", int: "integer", float: "number", dict: "object"}


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of config files.

    It knows every block that can be imported here, third parties' included. Editors complete and
    check TOML with it through a first line ``#:schema ./stack.schema.json``.
    """
    specs = []
    for kind in sorted(kinds()):
        try:
            specs.append(spec_of(kind))
        except ConfigError:
            continue  # a third party's block whose package is not installed in full
    defs = {}
    for spec in specs:
        defs[f"block.{spec.kind}"] = _block(spec, in_layers=False)
        if spec.is_layer:
            defs[f"layer.{spec.kind}"] = _block(spec, in_layers=True)
    defs["block"] = _choice([s.kind for s in specs], "block")
    defs["layer"] = _choice([s.kind for s in specs if s.is_layer], "layer")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "layered_store stack",
        "type": "object",
        "required": ["store"],
        "additionalProperties": False,
        "properties": {
            "$schema": {"type": "string"},
            "store": {"$ref": "#/$defs/block"},
            "lint": {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    "allow": {
                        "description": "rules that are accepted, as a list or with their reasons",
                        "anyOf": [
                            {"type": "array", "items": {"enum": list(RULES)}},
                            {
                                "type": "object",
                                "propertyNames": {"enum": list(RULES)},
                                "additionalProperties": {"type": "string"},
                            },
                        ],
                    },
                    "max_staleness": {
                        "description": "the oldest answer that is acceptable",
                        "anyOf": [
                            {"type": "number", "minimum": 0},
                            {"type": "string", "pattern": DURATION_PATTERN},
                        ],
                    },
                },
            },
        },
        "$defs": defs,
    }


def _choice(names: list[str], group: str) -> dict[str, Any]:
    """Pick the schema by ``use``, so that errors are about that block and no other."""
    return {
        "type": "object",
        "required": ["use"],
        "properties": {"use": {"anyOf": [{"enum": names}, _VARIABLE]}},
        "allOf": [
            {
                "if": {"properties": {"use": {"const": name}}, "required": ["use"]},
                "then": {"$ref": f"#/$defs/{group}.{name}"},
            }
            for name in names
        ],
    }


def _block(spec: BlockSpec, *, in_layers: bool) -> dict[str, Any]:
    properties: dict[str, Any] = {
        "use": {"const": spec.kind},
        "id": {
            "type": ["string", "null"],
            "minLength": 1,
            "description": "names the block for overrides",
        },
    }
    if not in_layers:
        properties["layers"] = {
            "type": "array",
            "items": {"$ref": "#/$defs/layer"},
            "description": "layers around this block, outermost first",
        }
    required = ["use"]
    for option in spec.options:
        if (in_layers and option.name == "inner") or not option.from_file:
            continue
        # None of our own options is negative; a third party's may be.
        ours = spec.cls.__module__.startswith("layered_store.")
        properties[option.name] = _option(option, at_least=0 if ours or option.duration else None)
        if option.required:
            required.append(option.name)
    return {
        "type": "object",
        "description": spec.doc,
        "required": required,
        "additionalProperties": False,
        "properties": properties,
    }


def _option(option: Option, *, at_least: float | None) -> dict[str, Any]:
    facts: dict[str, Any] = {"description": option.doc} if option.doc else {}
    if option.store:
        return {**facts, "$ref": "#/$defs/block"}
    forms: list[dict[str, Any]] = []
    if option.limited:
        forms.append({"enum": list(option.choices)})
    for kind in (kind for kind in _JSON if kind in option.free):
        if kind is dict and option.table:
            forms.append({"$ref": f"#/$defs/{option.table}"})
            continue
        bound = {"minimum": at_least} if kind in (int, float) and at_least is not None else {}
        forms.append({"type": _JSON[kind], **bound})
    if list in option.accepts:
        forms.append({"type": "array", "items": {"type": _JSON[option.item or str]}})
    if type in option.accepts:
        forms.append({"type": "string", "pattern": r"^[\w.]+:\w+(\.\w+)*$"})
    if option.duration:
        forms.append({"type": "string", "pattern": DURATION_PATTERN})
    if option.nullable:
        forms.append({"type": "null"})
        if str not in option.free:
            forms.append({"const": "none"})
    if str not in option.free:
        forms.append(_VARIABLE)
    facts["anyOf"] = forms
    default = option.default
    if isinstance(default, timedelta):
        default = default.total_seconds()
    if default is not MISSING and isinstance(default, str | int | float | bool):
        facts["default"] = default
    return facts
