"""Stacks as data: load a config file, check it, write it back."""

from layered_store.config.dumping import to_config
from layered_store.config.lint import Finding, LintWarning, Severity, lint
from layered_store.config.loader import load_stack
from layered_store.config.schema import json_schema

__all__ = [
    "Finding",
    "LintWarning",
    "Severity",
    "json_schema",
    "lint",
    "load_stack",
    "to_config",
]
