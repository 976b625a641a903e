"""Judge what was learned on tasks that were held out."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcmeta import rng
from funcmeta._check import check_count, is_function
from funcmeta._errors import ArgumentError, NonFiniteError
from funcmeta._typing import Meta
from funcmeta.evaluation._rows import quartiles
from funcmeta.tasks import Sampler, Streams
from funcmeta.training._objective import Objective, Score, Stream, objective
from funcmeta.training._ranks import Ranks


class Mean(NamedTuple):
    """A mean over tasks with its 95 % interval.

    Attributes:
        value: the mean.
        margin: half the width of the interval, by the normal approximation.

    Examples:
        >>> f"{Mean(0.7983, 0.0261)}"
        '0.798 ± 0.026'

    Source: this library.
    """

    value: float
    margin: float

    def __format__(self, sign: str) -> str:
        """Both, to three decimals, or to four digits where they are large; ``+`` shows the sign."""
        digits = ".3f" if max(abs(self.value), self.margin) < 1e6 else ".4g"
        return f"{self.value:{sign}{digits}} ± {self.margin:{digits}}"

    @classmethod
    def of(cls, scores: Tensor) -> "Mean":
        """The mean of scores [tasks], at least two."""
        return cls(scores.mean().item(), 1.96 * scores.std().item() / math.sqrt(len(scores)))


class Evaluation(NamedTuple):
    """The scores of held-out tasks.

    Attributes:
        scores: [tasks], float64.
        mean: their ``Mean``.

    Examples:
        >>> Evaluation(torch.tensor([1.0, 2.0, 3.0, 4.0, 90.0]), Mean(20.0, 34.3)).quartiles()
        (2.0, 3.0, 4.0)

    Source: this library.
    """

    scores: Tensor
    mean: Mean

    def quartiles(self, *, higher_is_better: bool = False) -> tuple[float, float, float]:
        """The lower quartile, the median and the upper quartile, each the better of two scores; NaN is the worst.

        A task that is far worse than all others moves the mean as far as it likes, and these hardly.
        """
        sign = -1 if higher_is_better else 1
        low, median, high = (sign * each.item() for each in quartiles(sign * self.scores)[::sign])
        return low, median, high

    def worse(self, before: "Evaluation", *, higher_is_better: bool = False) -> int:
        """Of how many tasks the score is worse than in an earlier evaluation of the same ones; NaN is the worst."""
        sign = -1 if higher_is_better else 1
        losses, earlier = (torch.where(each.isnan(), math.inf, sign * each) for each in (self.scores, before.scores))
        return int((losses > earlier).sum())


class Validation(NamedTuple):
    """Held-out tasks on which a training is judged on its way.

    Attributes:
        tasks: what held-out tasks are drawn from, e.g. a sampler of other classes than those that are trained on; for
            a language model streams, of which it reads each article by itself. The same tasks each time: number i is
            ``tasks.sample_batch(rng.fold(seed, 1, i), 1)``, with the seed of ``fit``.
        every: outer steps between two validations; there is one before the first step and one after the last, too.
        number: tasks that are judged on, at least 2; for a language model at most as many as there are articles.
        score: (predict, task) → number, of the module after it was adapted to the task; None: the algorithm's loss.
        higher_is_better: whether a score is to be high; a loss is to be low.
        patience: end the training when so many validations in a row brought nothing better; None: never.

    Examples:
        >>> Validation(fm.tasks.sinusoids(), every=100, patience=5).number
        20

    Source: this library.
    """

    tasks: Sampler | Streams
    every: int = 50
    number: int = 20
    score: Score | None = None
    higher_is_better: bool = False
    patience: int | None = None


def evaluate(
    algorithm: Any,
    meta: Meta,
    tasks: Sampler | Streams,
    *,
    number: int = 100,
    score: Score | None = None,
    seed: int = 0,
) -> Evaluation:
    """Judge what was learned on held-out tasks, one after the other, without a graph.

    Task number i is ``tasks.sample_batch(rng.fold(seed, 3, i), 1)``. No run of ``fit`` folds its seed with 3, so that
    these tasks are neither trained on nor validated on, whatever the seeds of both, even where one sampler draws all.

    Args:
        algorithm: what ``algorithms.<name>.build`` returned.
        meta: what was learned.
        tasks: a sampler of held-out tasks; for a language model streams, of which it reads each article by itself.
        number: how many tasks, at least 2; for a language model at most as many as there are articles.
        score: (predict, task) → number, of the module after ``algorithm.adapt``; None: the algorithm's loss, and for a
            language model the mean loss over an article's words.
        seed: integer from which the tasks follow; the articles of a language model are the first ones, whatever it is.

    Returns:
        The ``Evaluation``: the score of each task, and their mean with a 95 % interval.

    Raises:
        ArgumentError: ``number`` is below 2, the algorithm or the sampler has the wrong type, or a language model is
            given a ``score`` or fewer articles than ``number``.
        NonFiniteError: the training on a task is not finite; the message names the step.

    Examples:
        >>> def loss(meta, predict, batch):
        ...     x, y = batch
        ...     return ((predict(x) - y) ** 2).mean()
        >>> algorithm = fm.maml.build(torch.nn.Linear(1, 1), loss, steps=1, lr=0.01)
        >>> evaluate(algorithm, algorithm.init(), fm.tasks.sinusoids(), number=3).scores.shape
        torch.Size([3])

    Source: this library.
    """
    check_count("number", number, least=2, advice="Pass e.g. number=100.")
    check_score("score", score)
    aim = objective(algorithm, tasks)
    aim.check_judged(number, score)
    return judged(aim, meta, number, score, seed, Ranks(), Stream.EVALUATION)


def check_score(name: str, score: Any) -> None:
    """Raise unless this is a function or None."""
    if score is not None and not is_function(score):
        raise ArgumentError(f"{name} is {score!r}, expected a function (predict, task) → number, or None. Pass one.")


def judged(
    objective: Objective,
    meta: Meta,
    number: int,
    score: Score | None,
    seed: int,
    ranks: Ranks,
    stream: Stream,
    *,
    forgiving: bool = False,
) -> Evaluation:
    """The tasks are shared among the processes, each of which returns the scores of all.

    With ``forgiving`` a task whose training is not finite has the score NaN.
    """

    def score_of(index: int) -> float:
        own_seed = rng.fold(seed, stream, index)
        try:
            with rng.forked(rng.fold(own_seed, 1)):  # draws of a sampler or a score, too, are the same each time
                return objective.judge(meta, index, own_seed, score)
        except NonFiniteError:
            if not forgiving:
                raise
            return math.nan

    own = [score_of(index) for index in range(ranks.rank, number, ranks.number)]
    parts = ranks.gathered(own)
    shared = [parts[index % ranks.number][index // ranks.number] for index in range(number)]
    scores = torch.tensor(shared, dtype=torch.float64)
    return Evaluation(scores, Mean.of(scores))
