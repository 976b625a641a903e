"""Ordinary training of a language model: where the static weights of one that goes on learning come from."""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from funcmeta import tree
from funcmeta._check import check_count, check_positive
from funcmeta._errors import ArgumentError, DivergenceError, StructureError
from funcmeta.algorithms._language_model import LanguageModel


def train_static(
    net: LanguageModel,
    train: Tensor,
    validation: Tensor,
    *,
    epochs: int,
    lr: float = 3e-3,
    rows: int = 16,
    length: int = 32,
) -> Iterable[float]:
    """Train a language model as usual: the static weights that ``dynamic_lm`` begins with.

    Adam on the cross-entropy of the next word, the text cut in ``rows`` that are read side by side, gradients through
    ``length`` words, the norm of a gradient at most 1. After the last epoch the model has the weights, of all epochs,
    that the validation text is least surprising to.

    Args:
        net: the model, which is trained in place.
        train: word numbers of a text, int64 [words].
        validation: word numbers of another text, int64 [words].
        epochs: how often the text is read.
        lr: learning rate of Adam.
        rows: parts of the text that are read side by side.
        length: words between two updates.

    Returns:
        An iterator over the epochs, which gives the validation loss after each, in nats a word. Run it to its end.

    Raises:
        ArgumentError: a number is out of range, a text is too short, or has a word that the model does not know.
        StructureError: a text is no int64 [words].
        DivergenceError: in the iterator, no epoch left a model with a finite validation loss.

    Examples:
        >>> words = torch.arange(9).repeat(20)
        >>> [loss] = train_static(LanguageModel(9, 4), words, words, epochs=1)
        >>> loss < 3
        True

    Source: Merity, Keskar and Socher (2018), "Regularizing and Optimizing LSTM Language Models", in its simplest form.
    """
    for name, value in (("epochs", epochs), ("rows", rows), ("length", length)):
        check_count(name, value)
    check_positive("lr", lr)
    if not isinstance(net, LanguageModel):
        raise ArgumentError(f"net is a {type(net).__name__}, expected a LanguageModel. Pass one.")
    for name, text in (("train", train), ("validation", validation)):
        _check_text(name, text, net.embedding.num_embeddings)
    if len(train) < 2 * rows or len(validation) < 2:
        raise ArgumentError(
            f"the texts have {len(train)} and {len(validation)} words, expected at least {2 * rows} and 2. Pass longer "
            f"ones, or fewer rows."
        )
    return _epochs(net, train, validation, epochs, lr, rows, length)


_HELD = 4096
"""Words whose scores are held at once while a text is only read."""


def _surprise(net: LanguageModel, text: Tensor) -> float:
    """The mean loss of a word of a text."""
    hidden, losses = net.start(), []
    with torch.no_grad():
        for words, following in zip(torch.split(text[:-1], _HELD), torch.split(text[1:], _HELD), strict=True):
            scores, hidden = net(words, hidden)
            losses.append(F.cross_entropy(scores, following, reduction="none").double())
    return float(torch.cat(losses).mean())


def _check_text(name: str, text: Any, vocabulary: int) -> None:
    """Raise unless this is a row of numbers of words."""
    if not isinstance(text, Tensor) or text.dtype != torch.int64 or text.ndim != 1:
        raise StructureError(f"{name} is {tree.describe(text)}, expected int64 [words]. Pass Corpus.tokens(article).")
    if text.numel() and not 0 <= int(text.min()) <= int(text.max()) < vocabulary:
        raise ArgumentError(
            f"{name} has words from {int(text.min())} to {int(text.max())}, but the model knows 0 to {vocabulary - 1}. "
            f"Give the model the vocabulary of the text."
        )


def _epochs(
    net: LanguageModel, train: Tensor, validation: Tensor, epochs: int, lr: float, rows: int, length: int
) -> Iterable[float]:
    columns = train[: len(train) // rows * rows].view(rows, -1).T
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    best, kept = math.inf, {}
    for epoch in range(epochs):
        net.train()
        hidden = net.start(rows)
        for place in range(0, len(columns) - 1, length):
            following = columns[place + 1 : place + 1 + length]
            scores, hidden = net(columns[place : place + len(following)], hidden)
            hidden = (hidden[0].detach(), hidden[1].detach())
            optimizer.zero_grad()
            F.cross_entropy(scores.flatten(0, 1), following.flatten()).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
        net.eval()
        loss = _surprise(net, validation)
        if loss < best:
            best, kept = loss, {name: tensor.clone() for name, tensor in net.state_dict().items()}
        if epoch == epochs - 1:
            if not kept:
                raise DivergenceError(
                    "The validation loss of the language model is not finite after any epoch. Lower lr."
                )
            net.load_state_dict(kept)
        yield loss
