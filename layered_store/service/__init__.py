"""The HTTP service: ``create_app(stack)`` is an ASGI application."""

try:
    from layered_store.service.app import create_app
except ModuleNotFoundError as exc:
    if exc.name is None or exc.name.partition(".")[0] != "starlette":
        raise
    raise ModuleNotFoundError(
        "the service needs starlette: pip install 'layered-store[serve]'", name=exc.name
    ) from None

__all__ = ["create_app"]
