"""What becomes of the users of a :class:`~layered_store.layers.ramp.Ramp`: its two ways at work."""
