"""Plain text out of a dump of Wikipedia: pages out of XML, words out of markup."""

import bz2
import html
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from funcmeta._errors import DataError

LARGEST = 1 << 25
"""Bytes of XML that are read at most."""
MOST_ELEMENTS = 1 << 20
"""Elements of XML at most, each of which takes 100 bytes or more; a dump of the largest size has fewer."""
CHUNK = 1 << 16
"""Bytes that are unpacked and parsed at a time, so that what is refused is refused before the rest is unpacked."""

_DROPPED = re.compile(r"<!--|<(ref|math|gallery|timeline|code|pre)\b[^<>]*>")
_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}|\{\|[^{}]*\|\}")
_LINK = re.compile(r"\[\[(?![A-Za-z-]+:)(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]")
_FILE = re.compile(r"\[\[[^\[\]]*\]\]")
_ADDRESS = re.compile(r"\[?\bhttps?://[^\s\]]*\s?([^\]\n]*)\]?")
_LEFTOVERS = re.compile(r"<[^<>]*>|'{2,}")


class _Builder(ElementTree.TreeBuilder):
    """A builder of a tree of limited size, without entities, neither external ones nor ones that multiply."""

    def __init__(self) -> None:
        super().__init__()
        self._elements = 0

    def start(self, tag: Any, attrs: Any, /) -> Any:
        """Count an element."""
        self._elements += 1
        if self._elements > MOST_ELEMENTS:
            raise ValueError(f"it holds more than {MOST_ELEMENTS} elements")
        return super().start(tag, attrs)

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        """Refuse it: entities are declared there."""
        raise ValueError("it declares a document type")


def pages(path: Path, *, advice: str) -> Iterator[tuple[str, str]]:
    """Title and markup of each article in a dump, compressed by bzip2; redirects and other name spaces left out."""
    if not path.is_file():
        raise DataError(f"{path} does not exist, expected a dump of Wikipedia. {advice}")
    parser = ElementTree.XMLParser(target=_Builder())
    size = 0
    try:
        with bz2.open(path) as file:
            while chunk := file.read(CHUNK):
                size += len(chunk)
                if size > LARGEST:
                    raise ValueError(f"it holds more than {LARGEST} bytes")
                parser.feed(chunk)
        root = parser.close()
    except (OSError, EOFError, ValueError, ElementTree.ParseError) as error:
        raise DataError(f"{path} is truncated or no dump of Wikipedia: {error}. {advice}") from error
    for page in root.iterfind("{*}page"):
        if page.findtext("{*}ns") == "0" and page.find("{*}redirect") is None:
            yield page.findtext("{*}title") or "", page.findtext("{*}revision/{*}text") or ""


def plain(markup: str) -> list[str]:
    """The headings, as in WikiText, and the paragraphs; without templates, tables, references, files and lists."""
    text = _ADDRESS.sub(r"\1", _until_steady(_TEMPLATE, "", _dropped(markup)))
    text = _FILE.sub("", _until_steady(_LINK, r"\1", text))
    lines = [line for line in text.split("\n") if not line.startswith(("*", "#", ":", ";", "|", "!"))]
    cleaned = [html.unescape(_LEFTOVERS.sub("", _heading(line))).strip() for line in lines]
    return [line for line in cleaned if line]


def _dropped(markup: str) -> str:
    """The markup without comments and elements that are no text, in one pass: an end that is missing is missed once."""
    kept, place = [], 0
    missing: set[str] = set()
    while opening := _DROPPED.search(markup, place):
        closing = f"</{opening[1]}>" if opening[1] else "-->"
        end = -1 if closing in missing else markup.find(closing, opening.end())
        if end >= 0:
            stop, until = opening.start(), end + len(closing)
        else:
            missing.add(closing)
            until = opening.end()
            stop = opening.start() if opening[0].endswith("/>") else until
        kept.append(markup[place:stop])
        place = until
    return "".join([*kept, markup[place:]])


def _heading(line: str) -> str:
    """A heading with its signs one by one; another line as it is."""
    bare = line.rstrip()
    for level in range(6, 1, -1):
        if bare.startswith("=" * level) and bare.endswith("=" * level) and len(bare) >= 2 * level:
            signs = " ".join("=" * level)
            return f"{signs} {bare[level:-level].strip()} {signs}"
    return line


def _until_steady(pattern: re.Pattern[str], replacement: str, text: str, most: int = 20) -> str:
    """Replace, from the innermost outwards, as long as there is something to replace."""
    for _ in range(most):
        text, count = pattern.subn(replacement, text)
        if not count:
            break
    return text
