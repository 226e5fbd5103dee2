"""Makes our docstrings Markdown for the API reference."""

from __future__ import annotations

import re

import griffe

_ROLE = re.compile(r":(?:class|meth|mod|attr|func|exc):`([^`]+)`")


class PlainDocstrings(griffe.Extension):
    """Turns roles into code, double backticks into single ones and ``::`` into code blocks."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Rewrite the docstring of one class, function or module."""
        if obj.docstring is not None and not obj.is_alias:
            text = _ROLE.sub(r"`\1`", obj.docstring.value).replace("``", "`")
            obj.docstring.value = re.sub(r"::$", ":", text, flags=re.MULTILINE)
