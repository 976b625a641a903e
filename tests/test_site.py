"""The built site holds together: every link and anchor, every page in the navigation, nothing from the network."""

import re
import subprocess
import sys
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import pytest
from test_layers import LAYERS

ROOT = Path(__file__).parents[1]
SPELLED = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs", "examples", "funcmeta", "tests")
LOADED = {"link": "href", "script": "src", "img": "src", "source": "src", "iframe": "src", "video": "src"}
"""The attributes whose address a browser loads without being asked to, by tag; links of a page are followed."""
NAVIGATION = "md-nav--primary"


class Reference(NamedTuple):
    """An address in a page: what it says, whether it is loaded at once, and whether it stands in the navigation."""

    address: str
    loaded: bool
    navigation: bool


class Page(HTMLParser):
    """The references and the anchors of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[Reference] = []
        self.anchors = {"", "__top"}
        self._navs: list[bool] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "nav":
            self._navs.append(NAVIGATION in given.get("class", "").split())
        kind = "href" if tag == "a" else LOADED.get(tag)
        if kind in given:
            self.references.append(Reference(given[kind], tag != "a", any(self._navs)))

    def handle_endtag(self, tag: str) -> None:
        if tag == "nav":
            self._navs.pop()


def external(address: str) -> bool:
    parts = urlsplit(address)
    return bool(parts.netloc) or parts.scheme not in ("", "data")


def resolved(address: str, origin: str) -> tuple[str, str]:
    """The file and the anchor that an address means in the file ``origin``, as the site is served."""
    parts = urlsplit(address)
    path = unquote(parts.path)
    if not path:
        return origin, unquote(parts.fragment)
    names: list[str] = []
    for name in (*(() if path.startswith("/") else PurePosixPath(origin).parent.parts), *path.split("/")):
        names = names[:-1] if name == ".." else names if name in ("", ".") else [*names, name]
    whole = "/".join(names)
    directory = path.endswith(("/", "/.", "/..")) or path in (".", "..")
    return (f"{whole}/index.html".lstrip("/") if directory else whole), unquote(parts.fragment)


def complaints(files: Mapping[str, str]) -> list[str]:
    """What does not hold together among the files of a site, given by path with the text of those that have some."""
    pages = {name: Page(text) for name, text in files.items() if name.endswith(".html")}
    found = []
    for name, page in pages.items():
        for address, loaded, _ in page.references:
            if external(address):
                if loaded:
                    found.append(f"{name} loads {address}")
                continue
            target, anchor = resolved(address, name)
            if address.startswith("data:"):
                continue
            if target not in files:
                found.append(f"{name} refers to {address}: there is no {target}")
            elif target in pages and anchor not in pages[target].anchors:
                found.append(f"{name} refers to {address}: {target} has no anchor {anchor}")
    for name, text in files.items():
        if name.endswith(".css"):
            for address in re.findall(r"""url\(["']?([^"')]+)""", text) + re.findall(r"""@import ["']([^"']+)""", text):
                if external(address):
                    found.append(f"{name} loads {address}")
                elif not address.startswith(("data:", "#")) and resolved(address, name)[0] not in files:
                    found.append(f"{name} refers to {address}: there is no {resolved(address, name)[0]}")
    if "index.html" in pages:
        listed = {resolved(each.address, "index.html")[0] for each in pages["index.html"].references if each.navigation}
        found += [f"{name} is not in the navigation" for name in pages.keys() - listed - {"404.html"}]
    return found


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run((sys.executable, "-m", *command), cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of the site, built strictly; the text of pages and styles."""
    folder = tmp_path_factory.mktemp("site")
    done = run("mkdocs", "build", "--strict", "--quiet", "-f", ".mkdocs.yml", "-d", str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    return {
        path.relative_to(folder).as_posix(): path.read_text("utf-8") if path.suffix in (".html", ".css") else ""
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_site_holds_together(site: dict[str, str]) -> None:
    assert complaints(site) == []


def test_the_site_has_a_page_for_every_source(site: dict[str, str]) -> None:
    sources = [path.relative_to(ROOT / "docs").with_suffix("") for path in (ROOT / "docs").rglob("*.md")]
    pages = {"index.html" if str(name) == "index" else f"{name.as_posix()}/index.html" for name in sources}
    assert pages == {name for name in site if name.endswith("index.html")}


def test_no_page_needs_what_the_theme_would_load_when_it_runs(site: dict[str, str]) -> None:
    """The theme's script asks unpkg.com for diagrams, and a forge for the stars of a repository."""
    pages = [text for name, text in site.items() if name.endswith(".html")]
    assert not [text for text in pages if 'class="mermaid"' in text or 'data-md-component="source"' in text]


WHOLE = {
    "index.html": '<nav class="md-nav md-nav--primary"><a href=".">Start</a><a href="a/">A</a></nav><img src="x.png">',
    "a/index.html": '<h1 id="top">A</h1><a href="../#">start</a><a href="#top">top</a><img src="../x.png">',
    "404.html": '<script src="/x.png"></script><a href="/a/#top">A</a><a href="https://example.org">out</a>',
    "style.css": "a { background: url(x.png) } b { background: url('data:image/png;base64,00') }",
    "x.png": "",
}


def test_a_whole_site_passes() -> None:
    assert complaints(WHOLE) == []


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a/index.html", '<a href="../b/">b</a>', "a/index.html refers to ../b/: there is no b/index.html"),
        ("a/index.html", '<a href="#b">b</a>', "a/index.html refers to #b: a/index.html has no anchor b"),
        ("404.html", '<a href="/#b">b</a>', "404.html refers to /#b: index.html has no anchor b"),
        ("a/index.html", '<img src="x.png">', "a/index.html refers to x.png: there is no a/x.png"),
        ("404.html", '<script src="//example.org/x.js"></script>', "404.html loads //example.org/x.js"),
        ("404.html", '<link href="https://example.org/x.css">', "404.html loads https://example.org/x.css"),
        ("style.css", "@import 'https://example.org/x.css'", "style.css loads https://example.org/x.css"),
        ("style.css", "a { background: url(y.png) }", "style.css refers to y.png: there is no y.png"),
        ("b/index.html", "", "b/index.html is not in the navigation"),
    ],
)
def test_what_does_not_hold_is_found(name: str, text: str, message: str) -> None:
    assert message in complaints({**WHOLE, "a/index.html": '<h1 id="top">A</h1>', name: text})


def test_words_are_spelled_right() -> None:
    done = run("codespell_lib", *SPELLED)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_misspelled_word_is_found(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("They rec" + "ieve it.")
    assert run("codespell_lib", str(tmp_path)).returncode != 0


def test_the_picture_of_the_layers_is_that_of_the_table() -> None:
    words = set(re.findall(r"\w+", (ROOT / "docs" / "images" / "layers.svg").read_text("utf-8")))
    missing = {name for layer in LAYERS for name in layer} - words
    assert not missing, f"{missing} are not in docs/images/layers.svg: run python docs/scripts/layers.py"
