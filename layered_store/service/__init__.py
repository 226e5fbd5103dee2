"""The HTTP service: ``create_app(stack)`` is an ASGI application."""

from layered_store.service.app import create_app

__all__ = ["create_app"]
