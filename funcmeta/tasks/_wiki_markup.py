"""Plain text out of a dump of Wikipedia: pages out of XML, words out of markup."""

import bz2
import html
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

from funcmeta._errors import DataError

LARGEST = 1 << 25
"""Bytes of XML that are read at most."""

_DROPPED = re.compile(r"<!--.*?-->|<(ref|math|gallery|timeline|code|pre)\b[^<>]*(?:/>|>.*?</\1>)", re.DOTALL)
_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}|\{\|[^{}]*\|\}")
_LINK = re.compile(r"\[\[(?![A-Za-z-]+:)(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]")
_FILE = re.compile(r"\[\[[^\[\]]*\]\]")
_ADDRESS = re.compile(r"\[?\bhttps?://[^\s\]]*\s?([^\]\n]*)\]?")
_HEADING = re.compile(r"^(={2,6})\s*(.*?)\s*\1\s*$")
_LEFTOVERS = re.compile(r"<[^<>]*>|'{2,}")


class _NoDoctype(ElementTree.TreeBuilder):
    """A builder that takes no document type, and so no entities, neither external ones nor ones that multiply."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        """Refuse it."""
        raise ValueError("it declares a document type")


def pages(path: Path, *, advice: str) -> Iterator[tuple[str, str]]:
    """Title and markup of each article in a dump, compressed by bzip2; redirects and other name spaces left out."""
    if not path.is_file():
        raise DataError(f"{path} does not exist, expected a dump of Wikipedia. {advice}")
    try:
        with bz2.open(path) as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ValueError(f"it holds more than {LARGEST} bytes")
        root = ElementTree.fromstring(content, parser=ElementTree.XMLParser(target=_NoDoctype()))
    except (OSError, EOFError, ValueError, ElementTree.ParseError) as error:
        raise DataError(f"{path} is truncated or no dump of Wikipedia: {error}. {advice}") from error
    for page in root.iterfind("{*}page"):
        if page.findtext("{*}ns") == "0" and page.find("{*}redirect") is None:
            yield page.findtext("{*}title") or "", page.findtext("{*}revision/{*}text") or ""


def plain(markup: str) -> list[str]:
    """The headings, as in WikiText, and the paragraphs; without templates, tables, references, files and lists."""
    text = _ADDRESS.sub(r"\1", _until_steady(_TEMPLATE, "", _DROPPED.sub("", markup)))
    text = _FILE.sub("", _until_steady(_LINK, r"\1", text))
    lines = [line for line in text.split("\n") if not line.startswith(("*", "#", ":", ";", "|", "!"))]
    cleaned = [html.unescape(_LEFTOVERS.sub("", _HEADING.sub(_spaced, line))).strip() for line in lines]
    return [line for line in cleaned if line]


def _spaced(heading: re.Match[str]) -> str:
    """A heading with its signs one by one."""
    signs = " ".join(heading[1])
    return f"{signs} {heading[2]} {signs}"


def _until_steady(pattern: re.Pattern[str], replacement: str, text: str, most: int = 20) -> str:
    """Replace, from the innermost outwards, as long as there is something to replace."""
    for _ in range(most):
        text, count = pattern.subn(replacement, text)
        if not count:
            break
    return text
