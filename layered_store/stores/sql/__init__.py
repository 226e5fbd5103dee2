"""The backend that keeps states in SQLite, PostgreSQL, MariaDB or MySQL."""

from layered_store.stores.sql.store import SQLStore

__all__ = ["SQLStore"]
