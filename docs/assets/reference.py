"""Fills the pages of the API reference, so that no public name is left out.

In a page, ``<!-- names of layered_store.layers -->`` stands for an entry of each public name that
is defined there or below, and ``<!-- other names -->`` for those that no page has.
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

PUBLIC = (
    "layered_store",
    "layered_store.clock",
    "layered_store.coherence",
    "layered_store.config",
    "layered_store.copying",
    "layered_store.enumerable",
    "layered_store.metrics.catalogue",
    "layered_store.service",
    "layered_store.stats",
    "layered_store.testing",
)
"""The modules that users import from."""

_DIRECTIVE = re.compile(r"^<!-- names of ([\w. ]+) -->$", re.MULTILINE)
_REST = "<!-- other names -->"
_ENTRY = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)
_PAGES = Path(__file__).parents[1] / "reference"


def public_names() -> dict[str, str]:
    """Return every public name with the dotted place where it is defined."""
    found = {}
    for module_name in PUBLIC:
        module = importlib.import_module(module_name)
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            home = getattr(value, "__module__", None)
            if not isinstance(home, str) or not home.startswith("layered_store"):
                home = _home_of(name, value, module_name)
            found[f"{module_name}.{name}"] = f"{home}.{getattr(value, '__name__', name)}"
    return found


def _home_of(name: str, value: Any, module_name: str) -> str:
    """Return the module that a constant comes from: an object does not know."""
    homes = [
        path
        for path, module in list(sys.modules.items())
        if path.startswith("layered_store.")
        and name in getattr(module, "__all__", ())
        and getattr(module, name, None) is value
    ]
    return max(homes, key=lambda path: path.count("."), default=module_name)


def expand(markdown: str) -> str:
    """Return a page with its directives replaced by entries."""
    markdown = _DIRECTIVE.sub(lambda match: _below(match[1].split()), markdown)
    if _REST in markdown:
        named = {
            entry
            for page in _PAGES.glob("*.md")
            for entry in entries(page.read_text().replace(_REST, ""))
        }
        rest = sorted(set(public_names().values()) - named)
        markdown = markdown.replace(_REST, "\n\n".join(f"::: {place}" for place in rest))
    return markdown


def _below(prefixes: list[str]) -> str:
    places = sorted(set(public_names().values()), key=lambda place: place.rpartition(".")[2])
    chosen = [
        place for place in places if any(place.startswith(f"{prefix}.") for prefix in prefixes)
    ]
    return "\n\n".join(f"::: {place}" for place in chosen)


def entries(markdown: str) -> list[str]:
    """Return the dotted places that a page documents."""
    return _ENTRY.findall(expand(markdown))


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Tell MkDocs what a page holds."""
    return expand(markdown)
