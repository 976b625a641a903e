"""One parameter whose influence changes its sign with time: truncation follows the short run, and goes the wrong way.

Tallec and Ollivier 2017, "Unbiasing Truncated Backpropagation Through Time" (arXiv:1705.08209); the settings
are those of Vicol, Metz and Sohl-Dickstein 2021 (arXiv:2112.13835). The state has 23 numbers,

    s' = A s + θ (1, …, 1, −1, …, −1),    A = ½ on the diagonal and above it,    L = ½ (s₀ − 1)²,

with 10 ones. At once θ pushes s₀ up, in the long run down: L(θ) = ½ (6 θ + 1)², which is least at θ = −1/6.
"""

import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1]))
from _show import save

import funcmeta as fm

SIZE, POSITIVE, START, OPTIMUM = 23, 10, 0.5, -1 / 6
LONG = 200  # steps after which the state has come to rest
TASK = fm.Task(torch.zeros(1), None)
PUBLISHED = {"exact": 24.0, "truncated, K=1": -4.0, "truncated, K=10": -40.0, "truncated, K=50": 19.01}
"""Derivative of L by θ at θ = ½."""

A = 0.5 * (torch.eye(SIZE) + torch.diag(torch.ones(SIZE - 1), 1)).double()
SIGNS = torch.tensor([1.0] * POSITIVE + [-1.0] * (SIZE - POSITIVE)).double()


def judge(theta: Tensor, state: Tensor, query: Any, seed: int) -> Tensor:
    """L of a state."""
    return 0.5 * (state[0] - 1) ** 2


def step(theta: Tensor, state: Tensor, batch: Any, seed: int) -> tuple[Tensor, fm.StepInfo]:
    """The next state."""
    return A @ state + theta * SIGNS, fm.StepInfo(judge(theta, state, None, seed))


PROBLEM = fm.Problem(lambda theta, task, seed: torch.ones(SIZE).double(), step, judge)


def slopes() -> dict[str, tuple[float, float]]:
    """L and its derivative at the start after a long run, by estimator."""
    estimators: dict[str, fm.estimators.Estimator] = {"exact": fm.Reverse()}
    estimators |= {f"truncated, K={length}": fm.Truncated(length) for length in (1, 10, 50)}
    found = {}
    for name, estimator in estimators.items():
        theta = torch.tensor(START).double().requires_grad_()
        out = fm.unroll(PROBLEM, theta, TASK, steps=LONG, estimator=estimator)
        (slope,) = torch.autograd.grad(out.loss, theta)
        found[name] = (out.loss.item(), slope.item())
    return found


def learn(
    name: str, estimator: fm.estimators.Estimator, *, outer_steps: int, steps: int, lr: float, carries: bool
) -> list[float]:
    """θ after each outer step, from windows of one long run that go on, or from runs that begin anew."""
    theta = torch.tensor(START).double().requires_grad_()
    outer = torch.optim.SGD([theta], lr=lr)
    carry, path = None, [START]
    for seed in track(range(outer_steps), name):
        outer.zero_grad()
        out = fm.unroll(PROBLEM, theta, TASK, steps=steps, estimator=estimator, seed=seed, carry=carry)
        out.loss.backward()
        outer.step()
        carry = out.carry if carries else None
        path.append(theta.item())
    return path


def draw(paths: dict[str, list[float]], per_step: dict[str, int]) -> Figure:
    """θ against outer steps."""
    picture = Figure(figsize=(7, 4), layout="constrained")
    axes = picture.subplots()
    for (name, path), style in zip(paths.items(), ("-", "-", "-", ":"), strict=True):  # the last two fall together
        axes.plot([per_step[name] * step for step in range(len(path))], path, style, label=name, linewidth=2)
    axes.axhline(OPTIMUM, color="0.4", linestyle="--", linewidth=1, label="optimum, −1/6")
    axes.set(xlabel="outer steps of rate 1e-4", ylabel="θ", ylim=(-0.5, 2))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return picture


def main(
    quick: Annotated[bool, typer.Option(help="1,000 outer steps instead of 3,000.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the figures and the picture.")] = Path("influence_balancing"),
) -> None:
    """Compare derivatives at one point, and follow four estimators from there."""
    torch.set_num_threads(1)
    derivatives = slopes()
    for name, (loss, slope) in derivatives.items():
        print(f"{name:16} L = {loss:.3f}  dL/dθ = {slope:7.2f}  published: {PUBLISHED[name]:7.2f}")

    online = {"outer_steps": 1000 if quick else 3000, "steps": 1, "lr": 1e-4, "carries": True}
    whole = {"outer_steps": 10 if quick else 30, "steps": 100, "lr": 1e-2, "carries": False}  # each is slow, so fewer
    runs: dict[str, tuple[fm.estimators.Estimator, dict[str, Any]]] = {
        "forward mode, 100 steps": (fm.ForwardMode(), whole),
        "PES, K=1": (fm.PersistentES(sigma=0.1, pairs=500, length=1), online),
        "ES, K=1": (fm.EvolutionStrategies(sigma=0.1, pairs=500), online),
        "truncated, K=1": (fm.Truncated(1), online),
    }
    paths = {name: learn(name, estimator, **options) for name, (estimator, options) in runs.items()}
    for name, path in paths.items():
        print(f"{name:24} θ: {path[0]:.3f} → {path[-1]:8.5f}  from the optimum: {path[-1] - OPTIMUM:+.5f}")
    per_step = {name: round(options["lr"] / 1e-4) for name, (_, options) in runs.items()}
    save(out, {"derivatives": derivatives, "optimum": OPTIMUM, "theta": paths}, draw(paths, per_step))


if __name__ == "__main__":
    typer.run(main)
