"""Articles as numbers: who is trained on what, one vocabulary, and streams of segments to read."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from funcmeta import rng
from funcmeta._check import check_count
from funcmeta._errors import ArgumentError
from funcmeta.tasks._task import Task
from funcmeta.tasks.articles import END, Article

UNKNOWN = "<unk>"
"""The token for every word outside of the vocabulary."""


def split(
    articles: Sequence[Article], *, validation: int, test: int, seed: int = 0
) -> tuple[tuple[Article, ...], tuple[Article, ...], tuple[Article, ...]]:
    """Articles to train on, to choose settings by, and to be judged on: no article is in two parts.

    Args:
        articles: all of them.
        validation: how many to choose settings by.
        test: how many to be judged on.
        seed: which ones, a pure function of it.

    Returns:
        The articles to train on, for validation and for the test, each in the order in which they came.

    Raises:
        ArgumentError: something else than articles, nothing would be left to train on, or a number is negative.

    Examples:
        >>> articles = [Article(title, (title,)) for title in "abcdef"]
        >>> train, validation, test = split(articles, validation=1, test=2)
        >>> len(train), len(validation), len(test)
        (3, 1, 2)

    Source: this library.
    """
    _check_articles("articles", articles)
    check_count("validation", validation, least=0)
    check_count("test", test, least=0)
    if validation + test >= len(articles):
        raise ArgumentError(
            f"validation + test is {validation + test}, expected less than {len(articles)}, the number of articles. "
            f"Leave some to train on."
        )
    order = torch.randperm(len(articles), generator=rng.generator(seed)).tolist()
    parts = (order[validation + test :], order[:validation], order[validation : validation + test])
    train, chosen, held = (tuple(articles[index] for index in sorted(part)) for part in parts)
    return train, chosen, held


def corpus(
    train: Sequence[Article], validation: Sequence[Article], test: Sequence[Article], *, vocabulary: int = 4000
) -> "Corpus":
    """Articles with one vocabulary, which the articles to train on make.

    Args:
        train: articles to train on.
        validation: articles to choose settings by.
        test: articles to be judged on.
        vocabulary: number of tokens at most: ``<unk>``, ``<eos>`` and the most frequent words of ``train``.

    Returns:
        The ``Corpus``.

    Raises:
        ArgumentError: a part holds something else than articles, ``train`` is empty, or ``vocabulary`` is below 2.

    Examples:
        >>> articles = [Article("a", ("the", "cat", "the", "<eos>"))]
        >>> corpus(articles, [], [], vocabulary=3).vocabulary
        ('<unk>', '<eos>', 'the')

    Source: this library.
    """
    check_count("vocabulary", vocabulary, least=2)
    for name, part in (("train", train), ("validation", validation), ("test", test)):
        _check_articles(name, part)
    if not train:
        raise ArgumentError("train is empty, expected articles to make a vocabulary of. Pass at least one.")
    counts = Counter(word for article in train for word in article.words)
    words = sorted(counts.keys() - {UNKNOWN, END}, key=lambda word: (-counts[word], word))
    return Corpus((UNKNOWN, END, *words[: vocabulary - 2]), tuple(train), tuple(validation), tuple(test))


@dataclass(frozen=True)
class Corpus:
    """Articles in three parts, and the vocabulary they are read with.

    Attributes:
        vocabulary: the words by number: ``<unk>``, ``<eos>``, then the most frequent first.
        train: articles to train on.
        validation: articles to choose settings by.
        test: articles to be judged on.

    Examples:
        >>> corpus = Corpus(("<unk>", "<eos>", "cat"), (Article("a", ("a", "cat", "<eos>")),), (), ())
        >>> corpus.tokens(corpus.train[0])
        tensor([0, 2, 1])

    Source: this library.
    """

    vocabulary: tuple[str, ...]
    train: tuple[Article, ...]
    validation: tuple[Article, ...]
    test: tuple[Article, ...]

    def tokens(self, article: Article) -> Tensor:
        """The numbers of the article's words, int64 [words]; 0 for what is not in the vocabulary."""
        return torch.tensor([self._numbers.get(word, 0) for word in article.words], dtype=torch.int64)

    def stream(self, articles: Sequence[Article], length: int) -> Task:
        """Articles one after the other, in segments.

        The support gives for a step its segment: words and the words that follow them, both int64 [length]; the last
        segment of an article is as long as what is left of it. So no segment lies in two articles, and the number of
        steps is the length of the spec, which has the index of the article for each segment.
        """
        check_count("length", length)
        _check_articles("articles", articles)
        return self._stream(articles, length)

    def _stream(self, articles: Sequence[Article], length: int) -> Task:
        segments, places = [], []
        for index, article in enumerate(articles):
            tokens = self.tokens(article)
            pairs = list(zip(*[torch.split(part, length) for part in (tokens[:-1], tokens[1:])], strict=True))
            segments += pairs
            places += [index] * len(pairs)
        return Task(segments.__getitem__, None, tuple(places))

    def streams(self, articles: Sequence[Article], length: int) -> "Streams":
        """A sampler of streams that have these articles in an order of their own."""
        check_count("length", length)
        _check_articles("articles", articles)
        return Streams(self, tuple(articles), length)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self.vocabulary)}


@dataclass(frozen=True)
class Streams:
    """The same articles one after the other, in an order that follows from the seed.

    Attributes:
        corpus: what the articles are read with.
        articles: what is read.
        length: words in a segment.

    Examples:
        >>> articles = (Article("a", ("<eos>", "a", "a")), Article("b", ("<eos>", "b", "b")))
        >>> streams = corpus(articles, [], []).streams(articles, length=2)
        >>> len(streams.sample(seed=0).spec)
        2

    Source: this library.
    """

    corpus: Corpus
    articles: tuple[Article, ...]
    length: int

    def sample(self, seed: int) -> Task:
        """The stream of this seed."""
        order = torch.randperm(len(self.articles), generator=rng.generator(seed)).tolist()
        return self.corpus._stream([self.articles[index] for index in order], self.length)

    def alone(self, index: int) -> Task:
        """The stream that has the article of this index only."""
        return self.corpus._stream([self.articles[index]], self.length)


def _check_articles(name: str, articles: Any) -> None:
    """Raise unless these are articles of words."""
    if not isinstance(articles, Sequence) or isinstance(articles, str | Article):
        raise ArgumentError(
            f"{name} is a {type(articles).__name__}, expected a list of Article. Pass what a loader returns."
        )
    for index, article in enumerate(articles):
        words: Any = article.words if isinstance(article, Article) else None
        whole = isinstance(words, Sequence) and not isinstance(words, str)
        if not whole or not all(isinstance(word, str) for word in words):
            raise ArgumentError(
                f"{name}[{index}] is {str(article)[:100]}, expected an Article of words. Pass what a loader returns."
            )
