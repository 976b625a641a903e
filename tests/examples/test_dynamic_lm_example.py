"""The example of the language model with three memories runs, and what it claims comes out."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from real_data import WIKITEXT, needs

import funcmeta as fm
from funcmeta.tasks import Article

Load = Callable[[str], ModuleType]

MOVING = ("dynamic evaluation", "dynamic evaluation, decay", "gates without FLUSH", "gates")


@pytest.fixture
def script(example: Load) -> ModuleType:
    return example("dynamic_lm.py")


def run(script: ModuleType, out: Path, **options: Any) -> dict[str, Any]:
    script.main(out=out, **options)
    assert (out / "picture.png").stat().st_size > 30_000
    figures: dict[str, Any] = json.loads((out / "figures.json").read_text())
    return figures


@pytest.fixture
def tiny(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    sizes = script.Sizes(vocabulary=200, width=8, longest=45, epochs=2, passes=1, window=5, opening=20)
    monkeypatch.setattr(script, "QUICK", sizes)
    monkeypatch.setattr(script, "RATES", (0.5,))
    monkeypatch.setattr(script, "DECAYS", (0.0, 0.01))
    return script


def test_a_tiny_run(tiny: ModuleType, tmp_path: Path) -> None:
    figures = run(tiny, tmp_path, quick=True)
    assert len(figures["rows"]) == 5
    assert figures["rows"]["static"]["growth"] == [0, 0, 0]
    assert figures["rows"]["gates"]["loss"] < figures["rows"]["static"]["loss"]
    parts = figures["articles"]
    assert len({title for titles in parts.values() for title in titles}) == sum(len(each) for each in parts.values())


def test_each_fold_is_a_run_of_its_own_and_all_are_judged_together(tiny: ModuleType, tmp_path: Path) -> None:
    figures = run(tiny, tmp_path, quick=True, folds=2)
    one, two = figures["folds"]
    assert one["rows"] != two["rows"]
    lengths = {article.title: min(len(article.words), 45) - 1 for article in fm.tasks.pydoc_articles()}
    words = [sum(lengths[title] for title in fold["articles"]["test"]) for fold in (one, two)]
    for name, row in figures["rows"].items():
        parts = [fold["rows"][name]["loss"] * share / sum(words) for fold, share in zip((one, two), words, strict=True)]
        assert row["loss"] == pytest.approx(sum(parts), abs=1e-4)
        low, high = sorted(fold["rows"][name]["growth"][0] for fold in (one, two))
        assert low <= row["growth"][0] <= high


def test_folds_test_every_article_once_and_learn_from_the_others(script: ModuleType) -> None:
    sizes = script.FULL["pydoc"]
    corpora = script.load("pydoc", None, sizes, 0, 3)
    tested = [article.title for corpus in corpora for article in corpus.test]
    assert sorted(tested) == [article.title for article in fm.tasks.pydoc_articles()]
    for corpus in corpora:
        parts = [{article.title for article in part} for part in (corpus.train, corpus.validation, corpus.test)]
        assert sum(map(len, parts)) == len(set().union(*parts)) == len(tested)
        assert len(corpus.validation) == len(tested) // 4


def test_the_figures_are_those_of_their_definitions(script: ModuleType) -> None:
    static = [torch.full((9,), 5.0), torch.full((6,), 5.0)]
    dynamic = [torch.tensor([5.0, 5, 5, 9, 9, 9, 3, 3, 3]), torch.tensor([4.0, 4, 0, 0, 2, 2])]
    assert script.growth(static, dynamic).tolist() == [2, 2]
    assert script.opening(static, dynamic, 3).tolist() == pytest.approx([5 - 8 / 3])
    mean, low, high = script.interval(torch.tensor([0.0, 1.0] * 50))
    assert mean == 0.5
    assert low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.01)
    assert high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.01)


def test_reading_gives_each_article_its_words(script: ModuleType) -> None:
    articles = [Article(str(size), ("a", "b") * size) for size in (3, 20, 11)]
    corpus = fm.tasks.corpus(articles, articles, articles)
    net = script.dynamic_lm.LanguageModel(len(corpus.vocabulary), 3)
    losses = script.read(script.constant(net, copy=1, update=0.1, flush=0), corpus, articles, 7)
    assert [len(each) for each in losses] == [2 * size - 1 for size in (3, 20, 11)]


def test_bad_options_are_refused(script: ModuleType) -> None:
    with pytest.raises(script.typer.BadParameter, match=r"wikitext needs --path, a folder with valid\.txt"):
        script.main(data="wikitext")
    with pytest.raises(
        script.typer.BadParameter, match=r"folds is 2, expected 1: wikitext has a file of test articles"
    ):
        script.main(data="wikitext", path=Path(), folds=2)
    with pytest.raises(
        script.typer.BadParameter, match="folds is 46, expected 1 to 45: a test reads two articles or m"
    ):
        script.main(data="invented", folds=46)
    with pytest.raises(
        script.typer.BadParameter, match="data is 'novels', expected one of pydoc, wikipedia, wikitext, inv"
    ):
        script.main(data="novels")


@pytest.mark.slow
def test_every_way_to_change_the_weights_gains_over_the_static_model(script: ModuleType, tmp_path: Path) -> None:
    """That the gain grows along an article is not claimed here: cross-validation does not show it on these articles."""
    rows = run(script, tmp_path)["rows"]
    for name in MOVING:
        assert rows[name]["loss"] < rows["static"]["loss"] - 0.5


@pytest.mark.slow
@needs(WIKITEXT)
def test_gain_grows_along_articles_of_wikitext(script: ModuleType, tmp_path: Path) -> None:
    rows = run(script, tmp_path, data="wikitext", path=WIKITEXT)["rows"]
    for name in MOVING:
        assert rows[name]["growth"][1] > 0
        assert rows[name]["loss"] < rows["static"]["loss"] - 0.1


@pytest.mark.slow
def test_flush_helps_where_the_static_model_has_learned_all_there_is(script: ModuleType, tmp_path: Path) -> None:
    figures = run(script, tmp_path, data="invented")
    for gained in figures["gained by FLUSH on the first words"].values():
        assert gained[1] > 0
    losses = {name: row["loss"] for name, row in figures["rows"].items()}
    assert losses["gates"] == min(losses.values())
    assert figures["rows"]["gates"]["growth"][1] > 0
