"""A small application: it greets people in the tone that they like.

In production ``Greeter(load_stack("stack.toml"))``, with REDIS_URL and DATABASE_URL set.
"""

from __future__ import annotations

from layered_store import Source, StateSnapshot, StateStore, UnavailableError

WARM = 0.5


class Greeter:
    """Greets people, and learns from what they say about it.

    Args:
        states: how each person likes to be spoken to.
    """

    def __init__(self, states: StateStore) -> None:
        self.states = states

    async def greet(self, user_id: str) -> str:
        """Return a greeting; without a state, or a store, a neutral one."""
        try:
            state = await self.states.get_latest(user_id)
        except UnavailableError:
            state = None
        if state is None:
            return "Hello."
        return "Hey, good to see you!" if state.get_axis("warmth") > WARM else "Good day."

    async def rate(self, user_id: str, warmth: float) -> None:
        """Note how warm a person wants it."""
        await self.states.upsert_latest(
            StateSnapshot(user_id, source=Source.SELF_REPORT, axes={"warmth": warmth})
        )

    async def forget(self, user_id: str) -> None:
        """Remove everything about a person."""
        await self.states.delete(user_id)
