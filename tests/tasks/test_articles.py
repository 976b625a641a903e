"""Articles: published files where they are at hand, and small ones of our own making everywhere."""

import bz2
import pickle
import re
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from real_data import WIKITEXT as REAL
from real_data import needs

from funcmeta import tasks
from funcmeta._errors import ArgumentError, DataError, MissingExtraError
from funcmeta.tasks import Article, _wiki_markup, articles

WIKITEXT = " \n = Ada = \n \n Ada was first . \n = = Life = = \n \n = Bob = \n \n He was <unk> . \n \n"
PAGE = "<page><title>{title}</title><ns>{ns}</ns>{more}<revision><text>{text}</text></revision></page>"

published = needs(REAL / "valid.txt")


def page(title: str, text: str, ns: int = 0, more: str = "") -> str:
    return PAGE.format(title=title, text=text.replace("&", "&amp;").replace("<", "&lt;"), ns=ns, more=more)


def dump(path: Path, *pages: str, head: str = "") -> Path:
    xml = f'{head}<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">{"".join(pages)}</mediawiki>'
    path.write_bytes(bz2.compress(xml.encode()))
    return path


def wikitext(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@published
@pytest.mark.parametrize(("name", "words"), [("valid", 217_646), ("test", 245_569)])
def test_wikitext_has_the_published_size(name: str, words: int) -> None:
    found = tasks.wikitext_articles(REAL / f"{name}.txt")
    assert len(found) == 60
    assert sum(len(article.words) for article in found) == words


@published
def test_wikitext_needs_the_blank_lines() -> None:
    """Two lines of the test file look like titles and stand inside of text."""
    titles = [article.title for article in tasks.wikitext_articles(REAL / "test.txt")]
    assert titles[0] == "Robert <unk>"
    assert not [title for title in titles if title.startswith("1 <unk>")]


@pytest.mark.skipif(find_spec("gensim") is None, reason="gensim, the extra 'articles', is not installed")
def test_gensim_brings_96_articles() -> None:
    assert len(tasks.wikipedia_articles()) == 96
    assert len(tasks.wikipedia_articles(least=0)) == 106


def test_wikitext_is_cut_at_its_titles(tmp_path: Path) -> None:
    first, second = tasks.wikitext_articles(wikitext(tmp_path / "a", WIKITEXT))
    assert first.title == "Ada"
    assert " ".join(first.words) == "<eos> = Ada = <eos> <eos> Ada was first . <eos> = = Life = = <eos>"
    assert second == Article(
        "Bob", ("<eos>", "=", "Bob", "=", "<eos>", "<eos>", "He", "was", "<unk>", ".", "<eos>", "<eos>")
    )
    assert tasks.wikitext_articles(tmp_path / "a", least=9) == (first,)


def test_topics_share_no_paragraph() -> None:
    found = tasks.pydoc_articles()
    assert len(found) > 40
    assert [article.title for article in found] == sorted({article.title for article in found})
    seen: set[str] = set()
    for article in found:
        assert len(article.words) > 200
        assert article.words[:2] == ("<eos>", "=")
        lines = {line for line in " ".join(article.words).split("<eos>") if len(line.split()) > 6}
        assert not lines & seen
        seen |= lines


def test_topics_without_their_repetitions_are_shorter() -> None:
    words = {article.title: len(article.words) for article in tasks.pydoc_articles(least=0)}
    assert words["compound"] < words["formatstrings"]
    assert words["for"] > 200


def test_markup_becomes_text(tmp_path: Path) -> None:
    text = (
        "{{Infobox|a={{b}}}}'''Ada''' wrote [[Program (code)|programs]] in [[London]].<ref name=x>No</ref><ref y/>\n"
        "[[File:a.jpg|thumb|Her [[house]] in [http://a.b London]]]\n== Life ==\n* a list\n# another\n: indented\n"
        "{|\n| cell {| inner |}\n|}<!-- hidden\n -->\n\nSee [http://a.b her page], 1815&nbsp;on.\n[[Category:People]]"
    )
    path = dump(tmp_path / "d", page("Ada", text), page("B", "#REDIRECT [[Ada]]", more='<redirect title="Ada" />'))
    assert [article.title for article in tasks.wikipedia_articles(path, least=0)] == ["Ada"]
    words = " ".join(tasks.wikipedia_articles(path, least=0)[0].words)
    assert words == (
        "<eos> = ada = <eos> ada wrote programs in london . <eos> = = life = = <eos> see her page , 1815 on . <eos>"
    )


def test_other_name_spaces_are_left_out(tmp_path: Path) -> None:
    path = dump(tmp_path / "d", page("Talk:Ada", "no " * 300, ns=1), page("Ada", "yes " * 201), page("B", "yes " * 9))
    assert [article.title for article in tasks.wikipedia_articles(path)] == ["Ada"]


@pytest.mark.skipif(find_spec("gensim") is None, reason="gensim, the extra 'articles', is not installed")
def test_gensim_is_not_imported() -> None:
    tasks.wikipedia_articles()
    assert "gensim" not in sys.modules


def test_a_missing_gensim_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(articles, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"gensim.*is not installed.*funcmeta\[articles\].*or pass a path"):
        tasks.wikipedia_articles()


BAD_WIKITEXT = {
    "missing": (None, "does not exist, expected a file of WikiText. Download"),
    "truncated": (WIKITEXT[:-6].encode(), "is truncated: its last line has no end. Download"),
    "not UTF-8": (WIKITEXT.replace("Ada", "Adé").encode("latin-1"), "is not UTF-8: .*0xe9.* Download"),
    "no articles": (b"a text\n= No title without blank lines =\nmore\n", "holds 0 articles, none of over 0 words. Dow"),
    "empty": (b"", "holds 0 articles"),
}


@pytest.mark.parametrize("name", BAD_WIKITEXT)
def test_bad_wikitext_is_refused(name: str, tmp_path: Path) -> None:
    content, message = BAD_WIKITEXT[name]
    if content is not None:
        (tmp_path / "a").write_bytes(content)
    with pytest.raises(DataError, match=message):
        tasks.wikitext_articles(tmp_path / "a")


LAUGHS = "".join(f'<!ENTITY l{each} "{f"&l{each - 1};" * 10}">' for each in range(1, 9))
ENTITY = '<!DOCTYPE mediawiki [<!ENTITY e SYSTEM "file:///etc/hostname">]>'
BAD_DUMPS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "does not exist, expected a dump of Wikipedia. Pass the path"),
    "not bzip2": (lambda path: path.write_bytes(b"<mediawiki/>"), "is truncated or no dump of Wikipedia: Invalid data"),
    "truncated bzip2": (
        lambda path: path.write_bytes(dump(path, page("A", "a " * 300)).read_bytes()[:-9]),
        "is truncated or no dump of Wikipedia: Compressed file ended",
    ),
    "truncated XML": (
        lambda path: path.write_bytes(bz2.compress(b"<mediawiki><page>")),
        "no dump .*: no element found",
    ),
    "external entity": (
        lambda path: dump(path, page("A", "a"), head=ENTITY),
        "no dump .*: it declares a document type",
    ),
    "multiplying entities": (
        lambda path: dump(path, "&l8;", head=f'<!DOCTYPE mediawiki [<!ENTITY l0 "lol">{LAUGHS}]>'),
        "no dump .*: it declares a document type",
    ),
    "a pickle": (
        lambda path: path.write_bytes(pickle.dumps({"a": 1})),
        "is truncated or no dump of Wikipedia: Invalid",
    ),
    "a binary of XML": (lambda path: path.write_bytes(bz2.compress(b"\xff\xfe" * 9)), "no dump of Wikipedia"),
    "no articles": (lambda path: dump(path, page("A", "a")), "holds 1 articles, none of over 200 words. Pass"),
}


@pytest.mark.parametrize("name", BAD_DUMPS)
def test_bad_dumps_are_refused(name: str, tmp_path: Path) -> None:
    write, message = BAD_DUMPS[name]
    write(tmp_path / "d")
    with pytest.raises(DataError, match=message):
        tasks.wikipedia_articles(tmp_path / "d")


def test_a_dump_that_unpacks_to_more_than_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = dump(tmp_path / "d", page("A", "a " * 9000))
    assert path.stat().st_size < 1000
    monkeypatch.setattr(_wiki_markup, "LARGEST", 10_000)
    with pytest.raises(DataError, match=r"it holds more than 10000 bytes\. Pass the path"):
        tasks.wikipedia_articles(path)


def test_a_dump_of_many_elements_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = dump(tmp_path / "d", "<a>" * 20_000 + "</a>" * 20_000)
    with pytest.raises(DataError, match="holds 0 articles"):
        tasks.wikipedia_articles(path)
    monkeypatch.setattr(_wiki_markup, "MOST_ELEMENTS", 10_000)
    with pytest.raises(DataError, match=r"it holds more than 10000 elements\. Pass the path"):
        tasks.wikipedia_articles(path)


@pytest.mark.parametrize("part", ["<ref>", "<!--", "{{", "[[", "[[a|", "<ref ", "<ref/>", "<ref></math>", "{|"])
def test_markup_without_ends_takes_no_longer(part: str) -> None:
    """What took hours when each beginning looked for its end in all that follows."""
    _wiki_markup.plain(part * 100_000)
    _wiki_markup.plain("==" + " " * 100_000 + part)


DROPPED = re.compile(r"<!--.*?-->|<(ref|math|gallery|timeline|code|pre)\b[^<>]*(?:/>|>.*?</\1>)", re.DOTALL)
HEADING = re.compile(r"^(={2,6})\s*(.*?)\s*\1\s*$")


@given(st.lists(st.sampled_from(["<ref", " x", ">", "/>", "</ref>", "<pre>", "</pre>", "<!--", "-->", "<", "a"])))
def test_what_is_dropped_is_what_a_pattern_with_backtracking_finds(parts: list[str]) -> None:
    markup = "".join(parts)
    assert _wiki_markup._dropped(markup) == DROPPED.sub("", markup)


@given(st.text("= ax\t\u00a0\x1c", max_size=20))
def test_headings_are_those_of_a_pattern_with_backtracking(line: str) -> None:
    expected = HEADING.sub(lambda found: f"{' '.join(found[1])} {found[2]} {' '.join(found[1])}", line)
    assert _wiki_markup._heading(line) == expected


@pytest.mark.parametrize("load", [tasks.wikitext_articles, tasks.wikipedia_articles])
def test_bad_arguments_are_refused(load: Callable[..., object]) -> None:
    with pytest.raises(ArgumentError, match=r"path is 3, expected the path of a file\. Pass a str or a Path"):
        load(3)
    with pytest.raises(ArgumentError, match="least is -1, expected an integer of at least 0"):
        load("a", least=-1)
