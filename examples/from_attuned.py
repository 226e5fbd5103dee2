"""States that the `attuned` package infers from a conversation: stored, read back, acted upon.

    pip install layered-store attuned
    python examples/from_attuned.py

Each message moves the estimate of its writer; each estimate is stored; the latest becomes the
context of the next prompt, and the history shows the way there. Both packages write one JSON.
"""

from __future__ import annotations

import asyncio
import tempfile

import attuned

from layered_store import Cached, Source, SQLStore, StateSnapshot, StateStore, describe

CONVERSATION = (
    "I would be most grateful if you could kindly provide a comprehensive explanation of the"
    " aforementioned configuration parameters, including their respective defaults.",
    "Hm. Maybe I could perhaps try the first one? I think it might possibly be wrong...",
    "I am worried. I am scared. I am anxious and nervous. What if it fails?",
    "THE DEADLINE IS TODAY!!! I need this done ASAP, just tell me what to type RIGHT NOW!!!",
    "Thank you so much, you are wonderful!",
)
WEIGHT = 0.6
"""How much a new message counts against what was known before."""


def heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}")


async def observe(states: StateStore, user_id: str, message: str) -> StateSnapshot:
    """Infer from one message, blend with what was known, and store the result."""
    before = await states.get_latest(user_id)
    axes = dict(before.axes) if before else {}
    trust = []
    for estimate in attuned.infer(message).all():
        known = axes.get(estimate.axis, 0.5)
        axes[estimate.axis] = round((1 - WEIGHT) * known + WEIGHT * estimate.value, 3)
        trust.append(estimate.confidence)
    state = StateSnapshot(
        user_id,
        source=Source.INFERRED,
        confidence=round(sum(trust) / len(trust), 3) if trust else 0.0,
        axes=axes,
    )
    await states.upsert_latest(state)
    return state


async def main(folder: str) -> None:
    stack = Cached(SQLStore(f"sqlite+aiosqlite:///{folder}/states.db"), ttl=60)
    heading("The stack")
    print(describe(stack))

    async with stack:
        heading("A conversation, and what it says about its writer")
        before = StateSnapshot("ada")
        for message in CONVERSATION:
            state = await observe(stack, "ada", message)
            print(f"> {message}")
            moved = {name: value - before.get_axis(name) for name, value in state.axes.items()}
            for name in sorted(moved, key=lambda name: -abs(moved[name]))[:3]:
                print(f"    {name:<26} {before.get_axis(name):.2f} -> {state.get_axis(name):.2f}")
            before = state

        heading("The latest state, read back as attuned's own snapshot")
        latest = await stack.get_latest("ada")
        assert latest is not None
        snapshot = attuned.StateSnapshot.from_json(latest.to_json().decode())
        context = attuned.RuleTranslator().to_prompt_context(snapshot)
        print(context.format_for_prompt())

        heading("History, newest first")
        history = await stack.get_history("ada", len(CONVERSATION))
        shown = sorted({name for state in history for name in state.axes})
        for name in shown:
            values = "  ".join(f"{state.get_axis(name):.2f}" for state in history)
            print(f"{name:<26} {values}")

        heading("Erased")
        await stack.delete("ada")
        print(await stack.get_latest("ada"), await stack.get_history("ada", 10))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(folder))
