"""Articles as numbers: the parts are disjoint, the vocabulary is that of training, and streams lose no word."""

import pytest
import torch

from funcmeta import tasks
from funcmeta._errors import ArgumentError
from funcmeta.tasks import Article

ARTICLES = [Article(f"{number}", (*["the"] * number, f"word{number}", "<eos>")) for number in range(1, 11)]


def test_the_parts_share_no_article_and_keep_the_order() -> None:
    parts = tasks.split(ARTICLES, validation=2, test=3, seed=1)
    assert [len(part) for part in parts] == [5, 2, 3]
    assert sorted(article.title for part in parts for article in part) == sorted(each.title for each in ARTICLES)
    for part in parts:
        places = [ARTICLES.index(article) for article in part]
        assert places == sorted(places)


def test_the_parts_follow_the_seed() -> None:
    before = torch.get_rng_state()
    assert tasks.split(ARTICLES, validation=2, test=3, seed=1) == tasks.split(ARTICLES, validation=2, test=3, seed=1)
    assert tasks.split(ARTICLES, validation=2, test=3, seed=1) != tasks.split(ARTICLES, validation=2, test=3, seed=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_vocabulary_is_that_of_the_training_articles() -> None:
    corpus = tasks.corpus(ARTICLES[:3], ARTICLES[3:5], ARTICLES[5:])
    assert corpus.vocabulary == ("<unk>", "<eos>", "the", "word1", "word2", "word3")
    assert corpus.tokens(ARTICLES[1]).tolist() == [2, 2, 4, 1]
    assert corpus.tokens(ARTICLES[3]).tolist() == [2, 2, 2, 2, 0, 1]
    assert tasks.corpus(ARTICLES, [], [], vocabulary=3).vocabulary == ("<unk>", "<eos>", "the")


def test_a_stream_has_every_word_and_no_segment_in_two_articles() -> None:
    corpus = tasks.corpus(ARTICLES, [], [])
    task = corpus.stream(ARTICLES, length=4)
    segments = [task.support(step) for step in range(len(task.spec))]
    for index, article in enumerate(ARTICLES):
        own = [segment for segment, place in zip(segments, task.spec, strict=True) if place == index]
        tokens = corpus.tokens(article)
        assert torch.equal(torch.cat([words for words, _ in own]), tokens[:-1])
        assert torch.equal(torch.cat([following for _, following in own]), tokens[1:])
        assert [len(words) for words, _ in own[:-1]] == [4] * (len(own) - 1)
        assert 1 <= len(own[-1][0]) <= 4
    assert task.query is None


def test_streams_have_the_articles_in_an_order_of_the_seed() -> None:
    corpus = tasks.corpus(ARTICLES, [], [])
    streams = corpus.streams(ARTICLES, length=4)
    first, again, other = (streams.sample(seed) for seed in (0, 0, 1))
    texts = [torch.cat([task.support(step)[0] for step in range(len(task.spec))]) for task in (first, again, other)]
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])
    assert torch.equal(texts[0].sort().values, texts[2].sort().values)
    alone = streams.alone(3)
    tokens = corpus.tokens(ARTICLES[3])
    assert torch.equal(torch.cat([alone.support(step)[0] for step in range(len(alone.spec))]), tokens[:-1])
    with pytest.raises(ArgumentError, match="length is 0, expected a positive integer"):
        corpus.streams(ARTICLES, 0)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"validation \+ test is 10, expected less than 10.*Leave some to train on"):
        tasks.split(ARTICLES, validation=4, test=6)
    with pytest.raises(ArgumentError, match="test is -1, expected an integer of at least 0"):
        tasks.split(ARTICLES, validation=4, test=-1)
    with pytest.raises(ArgumentError, match="train is empty, expected articles to make a vocabulary of"):
        tasks.corpus([], ARTICLES, [])
    with pytest.raises(ArgumentError, match="vocabulary is 1, expected an integer of at least 2"):
        tasks.corpus(ARTICLES, [], [], vocabulary=1)
    with pytest.raises(ArgumentError, match="length is 0, expected a positive integer"):
        tasks.corpus(ARTICLES, [], []).stream(ARTICLES, 0)
