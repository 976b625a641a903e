"""What the command compares on: tasks, a net, and how its answers are judged."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funcmeta import rng
from funcmeta._errors import ArgumentError
from funcmeta._typing import Meta
from funcmeta.problem import Predict
from funcmeta.tasks import Sampler, Task, glyphs, omniglot, sinusoids

Batch = tuple[Tensor, Tensor]

PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Apart:
    """The tasks of a sampler for one part: it folds the seeds, so that one seed gives each part other tasks."""

    sampler: Sampler
    part: str

    def sample(self, seed: int) -> Task:
        """The task of this seed."""
        return self.sampler.sample(rng.fold(seed, PARTS.index(self.part)))

    def sample_batch(self, seed: int, tasks: int) -> Task:
        """The stack of this seed."""
        return self.sampler.sample_batch(rng.fold(seed, PARTS.index(self.part)), tasks)


@dataclass(frozen=True)
class Subject:
    """Tasks of each split, a net with its initial parameters, a loss, and a score that people read."""

    title: str
    sampler: Callable[[str, torch.dtype], Sampler]
    net: nn.Module
    loss: Callable[[Meta, Predict, Batch], Tensor]
    score: Callable[[Tensor, Tensor], Tensor]
    score_name: str
    higher_is_better: bool = False


def subject(
    data: str, model: str, *, ways: int, shots: int, queries: int, size: int, filters: int, seed: int
) -> Subject:
    """The subject that the options name.

    Raises:
        ArgumentError: unknown data or model, or a model that does not fit the data.
        DataError: the files of ``omniglot:PATH`` cannot be read.
    """
    kind, _, path = data.partition(":")
    if kind not in ("glyphs", "omniglot", "sinusoids") or (kind == "omniglot") != bool(path):
        raise ArgumentError(f"data is '{data}', expected glyphs, omniglot:PATH or sinusoids. Pass one of them.")
    if model not in ("conv4", "mlp"):
        raise ArgumentError(f"model is '{model}', expected conv4 or mlp. Pass one of them.")
    if kind == "sinusoids":
        if model == "conv4":
            raise ArgumentError("model is 'conv4', which needs images, but sinusoids are points. Pass --model mlp.")
        with rng.forked(seed):
            net = mlp(1, 40, 1)

        def curves(split: str, dtype: torch.dtype) -> Sampler:
            known = sinusoids(shots, queries, dtype=dtype)
            return known if split == "train" else Apart(known, split)  # runs that are resumed go on with their tasks

        return Subject(
            f"{shots}-shot sinusoids, mlp",
            curves,
            net,
            _squared_error,
            F.mse_loss,
            "query error",
        )
    if model == "conv4" and size < 16:
        raise ArgumentError(f"size is {size}, expected at least 16: conv4 halves an image four times. Pass --size 16.")
    with rng.forked(seed):
        net = conv4(size, filters, ways) if model == "conv4" else mlp(size**2, 64, ways)

    @cache
    def sampler(split: str, dtype: torch.dtype) -> Sampler:
        if kind == "omniglot":
            return omniglot(path, ways, shots, queries, split, size=size, dtype=dtype)
        return glyphs(ways, shots, queries, split, size=size, dtype=dtype)

    return Subject(
        f"{ways}-way {shots}-shot {kind}, {model}",
        sampler,
        net,
        _cross_entropy,
        lambda out, y: (out.argmax(-1) == y).to(out.dtype).mean(),
        "query accuracy",
        higher_is_better=True,
    )


def conv4(size: int, filters: int, ways: int) -> nn.Module:
    """Four blocks of convolution, batch normalization, GELU and average pooling, and a linear layer.

    Smooth from end to end, so that the meta-loss is, and finite differences can judge its gradient in float32 too.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = 1
    for index in range(1, 5):
        layers[f"conv{index}"] = nn.Conv2d(channels, filters, 3, padding=1, bias=False)
        layers[f"norm{index}"] = nn.BatchNorm2d(filters, track_running_stats=False)
        layers[f"gelu{index}"] = nn.GELU()
        layers[f"pool{index}"] = nn.AvgPool2d(2)
        channels = filters
    layers["flat"] = nn.Flatten()
    layers["head"] = nn.Linear(filters * (size // 16) ** 2, ways)
    return nn.Sequential(layers)


def mlp(inputs: int, width: int, outputs: int) -> nn.Module:
    """Three linear layers with GELU between."""
    layers = {
        "flat": nn.Flatten(),
        "linear1": nn.Linear(inputs, width),
        "gelu1": nn.GELU(),
        "linear2": nn.Linear(width, width),
        "gelu2": nn.GELU(),
        "head": nn.Linear(width, outputs),
    }
    return nn.Sequential(OrderedDict(layers))


def _cross_entropy(meta: Meta, predict: Predict, batch: Batch) -> Tensor:
    images, labels = batch
    return F.cross_entropy(predict(images), labels)


def _squared_error(meta: Meta, predict: Predict, batch: Batch) -> Tensor:
    x, y = batch
    return F.mse_loss(predict(x), y)
