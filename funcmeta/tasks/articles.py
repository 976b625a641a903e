"""Articles to read: the topics of Python's documentation, Wikipedia, WikiText."""

import re
from collections.abc import Iterable
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from funcmeta._check import check_count, check_path
from funcmeta._errors import DataError, MissingExtraError
from funcmeta.tasks._wiki_markup import pages, plain

END = "<eos>"
"""The token that ends each line."""

_WORD = re.compile(r"\w+|([^\w\s])\1*")
_RULER = re.compile(r"^([^\w\s])\1{2,}$", re.MULTILINE)
_TITLE = re.compile(r"= [^=].*[^=] =|= [^=] =")
_DUMP = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"


class Article(NamedTuple):
    """One text, word by word.

    Attributes:
        title: what it is about.
        words: its words and signs, with ``<eos>`` at the end of each line; the first line is empty, the second is
            ``= title =``.

    Examples:
        >>> Article("Ada", ("<eos>", "=", "ada", "=", "<eos>", "a", "name", "<eos>")).title
        'Ada'

    Source: the format is that of WikiText (Merity et al. 2016, arXiv:1609.07843).
    """

    title: str
    words: tuple[str, ...]


def pydoc_articles(*, least: int = 200) -> tuple[Article, ...]:
    """The topics of Python's own documentation, as ``help()`` prints them; they come with Python.

    Topics repeat each other: a paragraph counts in the shortest topic that holds it and is left out of all others, so
    that no two articles share one. Words are in lower case.

    Args:
        least: only articles with more words than that, ends of lines not counted.

    Returns:
        The articles, by title. Their number follows the version of Python: 51 with 3.11.

    Raises:
        ArgumentError: ``least`` is negative.

    Examples:
        >>> articles = pydoc_articles()
        >>> articles[0].words[:5]
        ('<eos>', '=', 'assert', '=', '<eos>')

    Source: ``pydoc_data.topics`` of the standard library.
    """
    from pydoc_data.topics import topics

    check_count("least", least, least=0)
    known: set[str] = set()
    articles = []
    for title, text in sorted(topics.items(), key=lambda topic: (len(topic[1]), topic[0])):
        paragraphs = [" ".join(part.split()) for part in _RULER.sub("", text).split("\n\n")]
        articles.append(_article(title, [part for part in paragraphs[1:] if part not in known]))
        known.update(paragraphs)
    return tuple(article for article in sorted(articles) if _is_longer(article, least))


def wikipedia_articles(path: str | PathLike[str] | None = None, *, least: int = 200) -> tuple[Article, ...]:
    """The articles of a dump of Wikipedia, by default the one among gensim's test data.

    Headings and paragraphs only: no templates, tables, lists, references and captions. Words are in lower case.

    Args:
        path: a dump, compressed by bzip2, of at most 32 MiB of XML; None for the file that comes with gensim (1.7 MB,
            106 articles, of which 96 have over 200 words), which is read without importing gensim.
        least: only articles with more words than that, ends of lines not counted.

    Returns:
        The articles, in the order of the dump.

    Raises:
        MissingExtraError: no ``path``, and gensim is not installed.
        DataError: the file is missing, truncated, too large or no dump, or no article is long enough.
        ArgumentError: ``least`` is negative, or ``path`` is none.

    Examples:
        >>> wikipedia_articles("nowhere.xml.bz2")
        Traceback (most recent call last):
        ...
        funcmeta._errors.DataError: nowhere.xml.bz2 does not exist, expected a dump of Wikipedia. Pass the path of a...

    Source: Wikipedia (CC BY-SA 3.0), as distributed with gensim (https://radimrehurek.com/gensim).
    """
    check_count("least", least, least=0)
    file = _gensim() / _DUMP if path is None else check_path(path)
    advice = "Pass the path of a file like enwiki-latest-pages-articles1.xml.bz2, or install gensim."
    articles = [_article(title, plain(markup)) for title, markup in pages(file, advice=advice)]
    return _long_enough(articles, least, file, advice)


def wikitext_articles(path: str | PathLike[str], *, least: int = 0) -> tuple[Article, ...]:
    """The articles of a file of WikiText-2 or WikiText-103, word by word as published.

    An article begins at a line ``= Title =`` between two blank lines.

    Args:
        path: ``wiki.train.tokens``, ``wiki.valid.tokens`` or ``wiki.test.tokens``, or a file in their format.
        least: only articles with more words than that, ends of lines not counted.

    Returns:
        The articles, in the order of the file; with ``least=0`` they hold every word of it, and one ``<eos>`` a line.

    Raises:
        DataError: the file is missing, truncated or not UTF-8, or no article is long enough.
        ArgumentError: ``least`` is negative, or ``path`` is none.

    Examples:
        >>> wikitext_articles("wiki.valid.tokens")
        Traceback (most recent call last):
        ...
        funcmeta._errors.DataError: wiki.valid.tokens does not exist, expected a file of WikiText. Download...

    Source: Merity et al. 2016 (arXiv:1609.07843), section 4.3; the texts are Wikipedia's (CC BY-SA 3.0).
    """
    check_count("least", least, least=0)
    file, advice = check_path(path), "Download wikitext-2-v1 or wikitext-103-v1 and pass the path of one of its files."
    if not file.is_file():
        raise DataError(f"{file} does not exist, expected a file of WikiText. {advice}")
    try:
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8: {error}. {advice}") from error
    if text and not text.endswith("\n"):
        raise DataError(f"{file} is truncated: its last line has no end. {advice}")
    lines = [line.strip() for line in text.split("\n")[:-1]]
    starts = [
        index - 1
        for index in range(1, len(lines) - 1)
        if _TITLE.fullmatch(lines[index]) and not lines[index - 1] and not lines[index + 1]
    ]
    articles = [
        Article(lines[start + 1].strip("= "), _words(lines[start:stop]))
        for start, stop in zip(starts, [*starts, len(lines)][1:], strict=True)
    ]
    return _long_enough(articles, least, file, advice)


def _article(title: str, paragraphs: Iterable[str]) -> Article:
    """An article in the format of WikiText, from its paragraphs."""
    lines = ["", f"= {title} =", *paragraphs]
    return Article(title, _words([" ".join(each[0] for each in _WORD.finditer(line.lower())) for line in lines]))


def _words(lines: Iterable[str]) -> tuple[str, ...]:
    return tuple(word for line in lines for word in (*line.split(), END))


def _is_longer(article: Article, least: int) -> bool:
    return len(article.words) - article.words.count(END) > least


def _long_enough(articles: list[Article], least: int, file: Path, advice: str) -> tuple[Article, ...]:
    chosen = tuple(article for article in articles if _is_longer(article, least))
    if not chosen:
        raise DataError(f"{file} holds {len(articles)} articles, none of over {least} words. {advice}")
    return chosen


def _gensim() -> Path:
    """The folder of gensim, which is not imported."""
    spec = find_spec("gensim")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(
            "gensim, whose test data hold articles of Wikipedia, is not installed; it comes with the extra "
            'funcmeta[articles]. Run pip install ".[articles]" in a checkout of funcmeta, or pass a path.'
        )
    return Path(spec.submodule_search_locations[0])
