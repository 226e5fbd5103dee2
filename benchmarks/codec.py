"""Row 10: snapshot to bytes and back."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from benchmarks.figures import Figure, Result, spread
from benchmarks.rounds import compare, micro
from benchmarks.setting import AXES, Setting, snapshot, user
from layered_store import StateSnapshot
from layered_store.codec import SnapshotCodec

__all__ = ["run"]


async def run(setting: Setting) -> list[Result]:
    """Measure both ways."""
    state = snapshot(user(1))
    codec = SnapshotCodec(StateSnapshot)
    plain = msgspec.to_builtins(state)

    # No await inside: what is measured is the codec and one call.
    async def ours(_: int) -> Any:
        return codec.decode(codec.encode(state), state.user_id)

    async def with_json(_: int) -> Any:
        return json.loads(json.dumps(plain))

    async def wire(_: int) -> Any:
        return StateSnapshot.from_json(state.to_json())

    async def nothing(_: int) -> None:
        pass

    contenders = {"SnapshotCodec": ours, "json (dict)": with_json, "to_json, from_json": wire}
    try:
        import pydantic

        model = pydantic.create_model(
            "Model",
            user_id=(str, ...),
            updated_at_unix_ms=(int, ...),
            source=(str, ...),
            confidence=(float, pydantic.Field(ge=0, le=1)),
            axes=(dict[str, float], ...),
        )
        built = model(**plain)

        async def with_pydantic(_: int) -> Any:
            return model.model_validate_json(built.model_dump_json())

        contenders["pydantic"] = with_pydantic
    except ImportError:
        pass
    items = range(setting.some(5_000, 500))
    runs = {name: micro(call, items) for name, call in contenders.items()}
    costs = await compare({**runs, "(the call)": micro(nothing, items)}, setting.some(31, 2))
    own = costs.difference("SnapshotCodec", "(the call)")
    size = len(codec.encode(state)) - sum(len(name) for name in plain["axes"])
    names = sum(len(f"axis_{n}") for n in range(AXES))
    figures = [
        Figure(
            10,
            "encode and decode, ranges checked",
            type(own)(own.middle * 1e6, own.low * 1e6, own.high * 1e6),
            "µs",
            1.5,
        ),
        Figure(10, "stored bytes, 23 axes named axis_0 ...", spread([size + names]), "bytes", 520),
        Figure(10, "json against it", costs.ratio("json (dict)", "SnapshotCodec")),
    ]
    rows = [[name, costs.wall(name) * 1e6] for name in sorted(runs, key=costs.wall)]
    return [Result("Codec, both ways", figures, ["contender", "µs"], rows)]
