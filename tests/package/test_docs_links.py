"""Every relative link in the README and in `docs/` leads to a file, and to a heading of it where it names one."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def without_code(text: str) -> str:
    """`text` with nothing in its code blocks and code spans, where brackets are no links."""
    return re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "``", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def links(text: str) -> list[str]:
    """Targets of links and pictures that are not addresses of the web."""
    targets = re.findall(r"\]\(([^)\s]+)(?:\s[^)]*)?\)", without_code(text))
    targets += re.findall(r"^\[[^\]]+\]:\s*(\S+)", without_code(text), flags=re.M)
    return [target for target in targets if not re.match(r"[a-z][a-z0-9+.-]*:", target)]


def anchors(text: str) -> set[str]:
    """The names that GitHub gives the headings: lower case, hyphens for spaces, numbered where they repeat."""
    names: list[str] = []
    for heading in re.findall(r"^#+ +(.+?) *#*$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), flags=re.M):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        names.append(re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-"))
    return {name if not (n := names[:i].count(name)) else f"{name}-{n}" for i, name in enumerate(names)}


def broken(page: Path) -> list[str]:
    """The links of `page` that lead nowhere, or out of the repository."""
    found, root = [], ROOT if page.is_relative_to(ROOT) else page.parent
    for target in links(page.read_text(encoding="utf-8")):
        name, _, anchor = unquote(target).partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or not file.is_relative_to(root):
            found.append(f"{target}: no such file")
        elif anchor and anchor not in anchors(file.read_text(encoding="utf-8")):
            found.append(f"{target}: no such heading")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert not broken(page)


def test_the_pages_are_linked_with_one_another() -> None:
    """A page that no other one leads to is not found by a reader."""
    led_to = {
        (page.parent / unquote(target).partition("#")[0]).resolve()
        for page in PAGES
        for target in links(page.read_text(encoding="utf-8"))
        if not target.startswith("#")
    }
    assert not {page.name for page in PAGES[1:] if page not in led_to}


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(
        "# One `two` & three\n\n[a](README.md#one-two--three) [b](#four) ![c](none.png 'title') `[d](x)` [e](https://f)\n"
        "\n```\n[g](h)\n# Four\n```\n\n[i]: j.md\n",
        encoding="utf-8",
    )
    assert broken(tmp_path / "README.md") == ["#four: no such heading", "none.png: no such file", "j.md: no such file"]
