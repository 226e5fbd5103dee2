"""Puts README, CONTRIBUTING and CHANGELOG on the site, from where they stand in the repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
if (ROOT / "SECURITY.md").exists():
    PAGES["SECURITY.md"] = "security.md"


def for_the_site(markdown: str) -> str:
    """Return the text of a page of the root with its links as they are on the site."""
    markdown = markdown.replace("](docs/", "](")
    for root, page in PAGES.items():
        markdown = markdown.replace(f"]({root})", f"]({page})")
    return markdown


def on_files(files: Any, config: Any) -> Any:
    """Tell MkDocs of the pages that are not in docs/."""
    for root, page in PAGES.items():
        text = for_the_site((ROOT / root).read_text())
        files.append(File.generated(config, page, content=text))
    return files
