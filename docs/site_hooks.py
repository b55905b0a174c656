"""What makes docs/ and the pages around it a site: pages from outside docs/, and links that fit.

In the repository a page links to files by their place, `../checkpoints/README.md`. On the site some of these files are
pages of other names, and others, such as examples, are served as they are.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {  # in the repository: on the site
    "README.md": "index.md",
    "checkpoints/README.md": "checkpoints.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")


def linked(text: str, place: str) -> dict[str, str]:
    """Return what a page of the repository links to: {link: path in the repository}.

    Args:
        text: its Markdown.
        place: the page's path in the repository.
    """
    return {link: posixpath.normpath(posixpath.join(posixpath.dirname(place), link)) for link in LINK.findall(text)}


def site_place(path: str) -> str:
    """Return where a file of the repository is on the site."""
    return PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path}")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages from outside docs/, and the files that any page links to."""
    for path, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    pages = [file for file in files if file.src_uri.endswith(".md")]
    places = {path for file in pages for path in linked(file.content_string, repository_place(file.src_uri)).values()}
    for path in sorted(places):
        if site_place(path).startswith("files/") and (ROOT / path).is_file():
            files.append(File.generated(config, site_place(path), abs_src_path=str(ROOT / path)))
    return files


def repository_place(page: str) -> str:
    """Return where a page of the site is in the repository."""
    return {site: path for path, site in PAGES.items()}.get(page, f"docs/{page}")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Let a page's links lead to where things are on the site; what is not there, mkdocs reports."""
    source = page.file.src_uri
    for link, path in linked(markdown, repository_place(source)).items():
        target = posixpath.relpath(site_place(path), posixpath.dirname(source) or ".")
        markdown = re.sub(rf"(?<=\]\(){re.escape(link)}(?=[)#])", target, markdown)
    return markdown
