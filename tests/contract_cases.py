"""The one table of models, inner optimizers and numbers of steps that every exact estimator goes through."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funcmeta as fm
from funcmeta import optim

TASKS = 2


class ConvBatchNorm(nn.Sequential):
    """Convolution, batch normalization, and a head on the average."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.append(nn.Linear(2, 2))


class ConvGroupNorm(nn.Sequential):
    """Convolution, group normalization, and a head on everything."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.GELU(), nn.Flatten(), nn.Linear(36, 2))


class Recurrent(nn.Module):
    """A recurrent layer and a head on its last output."""

    def __init__(self, layer: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer = layer(2, 3, batch_first=True)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])  # type: ignore[no-any-return]


class Tied(nn.Module):
    """A language model as AWD-LSTM: the decoder's weight is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.layer = nn.LSTM(3, 3, batch_first=True)
        self.decoder = nn.Linear(3, 5)
        self.decoder.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.decoder(self.layer(self.embedding(words))[0])  # type: ignore[no-any-return]


class Attention(nn.Module):
    """A transformer block and a head on the average."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(4, 2, 4, dropout=0.0, activation=F.gelu, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x).mean(1))  # type: ignore[no-any-return]


def regression(meta: Any, predict: Any, batch: Any) -> Tensor:
    x, y = batch
    return F.mse_loss(predict(x), y)


def next_word(meta: Any, predict: Any, words: Tensor) -> Tensor:
    return F.cross_entropy(predict(words[:, :-1]).flatten(0, 1), words[:, 1:].flatten())


class Model(NamedTuple):
    """A module and data of its shape."""

    build: Callable[[], nn.Module]
    batch: Callable[[], Any]
    loss: Callable[[Any, Any, Any], Tensor] = regression


def numbers(*shape: int) -> Callable[[], Any]:
    return lambda: (torch.randn(shape, dtype=torch.float64), torch.randn(shape[0], 2, dtype=torch.float64))


MODELS = {
    "mlp": Model(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), numbers(5, 3)),
    "conv batchnorm": Model(ConvBatchNorm, numbers(4, 1, 5, 5)),
    "conv groupnorm": Model(ConvGroupNorm, numbers(3, 1, 5, 5)),
    "lstm": Model(lambda: Recurrent(nn.LSTM), numbers(3, 3, 2)),
    "gru": Model(lambda: Recurrent(nn.GRU), numbers(3, 3, 2)),
    "tied embedding": Model(Tied, lambda: torch.randint(5, (3, 4)), next_word),
    "attention": Model(Attention, numbers(3, 3, 4)),
}


class Optimizer(NamedTuple):
    """An inner optimizer and the hyper-parameters that are learned with the initial parameters."""

    build: Callable[[Mapping[str, Tensor]], fm.Transform]
    hypers: dict[str, float]


# eps is large so that one step of Adam and RMSprop is no mere sign, whose derivative would be that of first order.
OPTIMIZERS = {
    "sgd momentum": Optimizer(
        lambda meta: optim.sgd(meta["lr"], momentum=meta["momentum"]), {"lr": 0.1, "momentum": 0.6}
    ),
    "adam": Optimizer(
        lambda meta: optim.adam(meta["lr"], betas=(meta["beta1"], 0.95), eps=0.1), {"lr": 0.1, "beta1": 0.8}
    ),
    "rmsprop": Optimizer(lambda meta: optim.rmsprop(meta["lr"], alpha=0.9, eps=0.1), {"lr": 0.05}),
}
ESTIMATORS: dict[str, Any] = {
    "mixed mode": fm.MixedMode(),
    "forward mode": fm.ForwardMode(),
    "one window": fm.Truncated(10),
}
"""Those that are exact, besides Reverse, which they are held against."""
STEPS = (1, 3, 10)
PAIRS = [(model, optimizer) for model in MODELS for optimizer in OPTIMIZERS]
CASES = [(model, optimizer, steps) for model in MODELS for optimizer in OPTIMIZERS for steps in STEPS]


def equals_truth(mutant: str, steps: int) -> bool:
    """Whether a mutant is right: what an optimizer remembers before its first step is a constant, zero."""
    return mutant == "dropped moment" and steps == 1


@cache
def build(model: str, optimizer: str, dtype: torch.dtype = torch.float64) -> tuple[fm.Problem, Any, fm.Task]:
    """Problem, meta and stacked tasks of a case; the same numbers in every dtype."""
    with fm.rng.forked(1):
        case, inner = MODELS[model], OPTIMIZERS[optimizer]
        net = case.build().double()
        pairs = [fm.Task(case.batch(), case.batch()) for _ in range(TASKS)]
    tasks = fm.tasks.stack(pairs)
    hypers = {name: torch.tensor(value, dtype=torch.float64) for name, value in inner.hypers.items()}
    meta = {"params": dict(net.named_parameters()), **hypers}
    problem = fm.inner_problem(net.to(dtype), case.loss, optimizer=inner.build)
    meta, data = fm.tree.map(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, (meta, tasks[:2]))
    return problem, fm.tree.map(lambda leaf: leaf.detach().requires_grad_(), meta), fm.Task(*data)
