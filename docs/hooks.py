"""What the site has besides the pages of this folder, which read as they are on a code host.

It adds the pages of the root, the pictures of the tests and examples, and the reference, a page for
each group of public names, from their docstrings. Links to all of these are made to hold, and a
public name in a text leads to its place in the reference.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parent))
from pages import ROOT, public_names

# Pages that commands write, and that the menu has a place for before they are there.
AWAITED = ("scale.md", "wild.md")
PICTURES = ("baseline_images", "examples/baseline_images")
OF_THE_ROOT = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "ARCHITECTURE.md": "architecture.md",
    "README.md": "index.md",
}
TITLES = {f"reference/{title.lower().replace(' ', '-')}.md": title for title in public_names()}
_FENCE = re.compile(r"^(```+).*?^\1$", re.M | re.S)
_LINK = re.compile(r"(\]\()(?!\w+:|#)([^)\s#]+)(#[^)\s]*)?(\))")
_NAME = re.compile(r"(?<!\[)`([A-Za-z_]\w*)(\([^`]*\))?`(?!\])")


def on_config(config: MkDocsConfig) -> None:
    """Leave out of the menu what is not written yet."""
    for section in config.nav or ():
        for title, pages in section.items():
            if isinstance(pages, list):
                section[title] = [page for page in pages if not _is_awaited(*page.values())]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what lies elsewhere, and the reference."""
    for folder in PICTURES:
        for path in sorted((ROOT / folder).glob("*.png")):
            uri = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    for name, uri in OF_THE_ROOT.items():
        if uri not in files.src_uris:
            files.append(File.generated(config, uri, abs_src_path=str(ROOT / name)))
    for uri, title in TITLES.items():
        files.append(File.generated(config, uri, content=reference(title)))
    return files


def on_page_markdown(markdown: str, page: Page, files: Files, **_: Any) -> str:
    """Make links hold, and names lead to the reference."""
    uri = page.file.src_uri
    if uri in TITLES:
        return markdown
    at_root = uri in OF_THE_ROOT.values() and uri != "index.md"

    def outside_of_code(text: str) -> str:
        text = _LINK.sub(lambda found: _held(found, uri, "" if at_root else "docs"), text)
        return "\n".join(map(_named, text.split("\n")))

    parts, end = [], 0
    for fence in _FENCE.finditer(markdown):
        parts += [outside_of_code(markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, outside_of_code(markdown[end:])])


def reference(title: str) -> str:
    """Write the page of one group of names; mkdocstrings puts their docstrings in."""
    names = "\n\n".join(f"::: pytest_attnheat.{name}" for name in public_names()[title])
    return f"# {title}\n\n{names}\n"


def _is_awaited(uri: str) -> bool:
    return uri in AWAITED and not (ROOT / "docs" / uri).is_file()


def _held(found: re.Match[str], uri: str, folder: str) -> str:
    """A link between files of the repository as one between pages of the site."""
    target = posixpath.normpath(posixpath.join(folder, posixpath.dirname(uri), found[2]))
    target = OF_THE_ROOT.get(target, target.removeprefix("docs/"))
    relative = posixpath.relpath(target, posixpath.dirname(uri) or ".")
    return found[1] + relative + (found[3] or "") + found[4]


_KNOWN = {name for names in public_names().values() for name in names}


def _named(line: str) -> str:
    """A line whose public names are links; headings and the texts of links stay as they are."""
    if line.startswith("#"):
        return line
    parts = re.split(r"(!?\[[^\]]*\]\([^)]*\))", line)
    parts[::2] = [
        _NAME.sub(
            lambda found: (
                f"[{found[0]}][pytest_attnheat.{found[1]}]" if found[1] in _KNOWN else found[0]
            ),
            part,
        )
        for part in parts[::2]
    ]
    return "".join(parts)
