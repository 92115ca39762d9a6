"""The site: ``make docs`` builds it from docs/*.md and the docstrings into build/docs."""

from __future__ import annotations

import os
import re
from importlib.metadata import version as installed
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent

project = "bmtard"
release = installed("bmtard")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"bmtard {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
myst_heading_anchors = 4
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_typehints = "none"  # the signature shows them
maximum_signature_line_length = 80
suppress_warnings = ["myst.header"]  # an included file begins with its own title

# A link marked so stands for its file on the site, where that file's links are made the page's.
INCLUDE = re.compile(r"\[[^\]]+\]\((\S+)\) <!-- include -->")
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?\)")


def pages() -> dict[Path, str]:
    """Files elsewhere that are pages of the site: file -> page."""
    found = {}
    for page in DOCS.glob("*.md"):
        for name in INCLUDE.findall(page.read_text()):
            found[(DOCS / name).resolve()] = page.name
    return found


def linked(text: str, folder: Path, where: dict[Path, str]) -> str:
    """``text`` of a file in ``folder``, with links that work from docs/.

    A file that is a page becomes a link to it, another file of the repository a download, and a
    folder is only named. What does not exist is left to Sphinx, which warns.
    """

    def replace(match: re.Match[str]) -> str:
        target = match[2]
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        path = (folder / target).resolve()
        if path in where:
            return f"]({where[path]}{match[3] or ''})"
        if path.is_dir():
            return "]{folder}"
        return f"]({os.path.relpath(path, DOCS)}{match[3] or ''})"

    text = LINK.sub(replace, text)
    return re.sub(r"\[([^\]]*)\]\{folder\}", r"\1", text)


def demoted(text: str) -> str:
    """``text`` with every heading one level lower, for a page that has a title already."""
    parts = re.split(r"^(```.*?^```)", text, flags=re.DOTALL | re.MULTILINE)
    parts[::2] = [re.sub(r"^#", "##", part, flags=re.MULTILINE) for part in parts[::2]]
    return "".join(parts)


def read(app, name: str, content: list[str]) -> None:
    where = pages()
    before, *others = INCLUDE.split(content[0])
    parts = [linked(before, DOCS, where)]
    for name, after in zip(others[::2], others[1::2], strict=True):
        path = (DOCS / name).resolve()
        app.env.note_dependency(str(path))  # so that a change of it is built
        text = linked(path.read_text(), path.parent, where)
        parts += [demoted(text) if before else text, linked(after, DOCS, where)]
    content[0] = "".join(parts)


def plain(app, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Docstrings are plain text with ``literals``: a * or | elsewhere is no markup."""
    parts = re.split(r"(``.*?``|:\w+:`.*?`)", "\n".join(lines), flags=re.DOTALL)
    parts[::2] = [re.sub(r"([*|])", r"\\\1", part) for part in parts[::2]]
    lines[:] = "".join(parts).splitlines()


def setup(app) -> None:
    app.connect("source-read", read)
    app.connect("autodoc-process-docstring", plain, priority=100)  # before napoleon
