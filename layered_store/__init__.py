"""layered_store."""
