"""Learned optimizers written to files and read again; files that are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import funcmeta as fm
from funcmeta import learned

PARAMS = {"a.weight": torch.ones(3, 2), "a.bias": torch.ones(3)}
MAKERS = {
    "linear": lambda: learned.linear(gradient=-0.2, parameter=0.1),
    "lstm": lambda: learned.lstm(hidden=3, layers=1, preprocess="none", scale=0.5),
    "rnnprop": lambda: learned.rnnprop(hidden=3, beta1=0.5),
    "mlp": lambda: learned.mlp(hidden=4, exp_scale=0.01),
    "hierarchical": lambda: learned.hierarchical(coordinate=3, tensor=4),
    "gates": lambda: learned.gates(copy=0.9, update=0.2, flush=0.05, hidden=2),
    "hyperparameters": lambda: learned.hyperparameters(PARAMS, momentum=0.5, per="layer"),
}


def steps(optimizer: fm.LearnedOptimizer) -> Any:
    transform = fm.as_transform(optimizer)
    params, state = PARAMS, transform.init(PARAMS)
    for seed in range(3):
        torch.manual_seed(seed)
        updates, state = transform.update({name: torch.randn_like(p) for name, p in params.items()}, state, params)
        params = fm.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("kind", MAKERS)
def test_what_is_read_computes_the_same(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    optimizer = MAKERS[kind]()
    with torch.no_grad():
        for weight in optimizer.parameters():
            weight.add_(0.01)
    learned.save(optimizer, tmp_path / "optimizer.safetensors")
    before = torch.random.get_rng_state()
    again = learned.load(tmp_path / "optimizer.safetensors")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert again.config == optimizer.config
    assert again.kind == kind
    assert all(weight.requires_grad and weight.is_leaf for weight in again.parameters())
    for name, param in steps(optimizer).items():
        assert torch.equal(param, steps(again)[name])
    assert [path.name for path in tmp_path.iterdir()] == ["optimizer.safetensors"]


def test_the_dtype_is_kept(tmp_path: Path) -> None:
    learned.save(learned.lstm(hidden=2).double(), tmp_path / "o")
    assert next(learned.load(tmp_path / "o").parameters()).dtype is torch.float64


class Own(fm.LearnedOptimizer):
    """An optimizer of a kind that the library does not know."""

    def __init__(self, lr: float = 0.5) -> None:
        super().__init__()
        self.config = {"lr": lr}
        self.lr = nn.Parameter(torch.tensor(lr))

    def init_state(self, param: Tensor) -> tuple[()]:
        return ()

    def forward(self, param: Tensor, grad: Tensor, state: tuple[()]) -> tuple[Tensor, tuple[()]]:
        return -self.lr * grad, state


def test_a_kind_of_ones_own(tmp_path: Path) -> None:
    learned.save(Own(0.25), tmp_path / "own")
    with pytest.raises(fm.ArgumentError, match=r"kind 'Own', expected one of .*\. Pass make="):
        learned.load(tmp_path / "own")
    assert learned.load(tmp_path / "own", make=Own).lr == 0.25


def written(path: Path, tensors: dict[str, Tensor], **about: str) -> Path:
    save_file(tensors, path, metadata=about)
    return path


GOOD = {"funcmeta": "1", "kind": "linear", "config": json.dumps({"gradient": -0.1, "parameter": 0.0})}


@pytest.mark.parametrize(
    ("tensors", "about", "message"),
    [
        ({"weight": torch.ones(3)}, {}, r"has weights .*float32\[3\].*, expected .*float32\[2\]"),
        ({"weight": torch.ones(2, dtype=torch.int64)}, {}, r"has weights .*int64\[2\]"),
        ({"other": torch.ones(2)}, {}, "has weights"),
        (
            {"log_lr": torch.ones(1), "logit_momentum": torch.ones(1).double()},
            {
                "kind": "hyperparameters",
                "config": json.dumps({"shapes": {"a": [2]}, "lr": 0.1, "momentum": 0.5, "per": "all"}),
            },
            r"has weights .*float64\[1\]",
        ),
        ({"weight": torch.tensor([1.0, torch.nan])}, {}, "NaN or infinite"),
        ({"weight": torch.ones(2)}, {"funcmeta": "99"}, "expected 'funcmeta': '1'"),
        ({"weight": torch.ones(2)}, {"config": '{"gradient": "a"}'}, "config from which no 'linear' can be made"),
        ({"a": torch.ones(2)}, {"kind": "hyperparameters", "config": '{"shapes": [1]}'}, "no 'hyperparameters' can"),
        ({"weight": torch.ones(2)}, {"config": "{"}, "config from which no 'linear' can be made"),
        ({"weight": torch.ones(2)}, {"config": '{"lr": 1}'}, "config from which no 'linear' can be made"),
        (
            {"weight": torch.ones(2)},
            {"kind": "lstm", "config": '{"layers": 1000000000}'},
            "no 'lstm' can be made: layers is 1000000000, expected at most 1000 for so few weights",
        ),
        (
            {"weight": torch.ones(30_000)},
            {"kind": "lstm", "config": '{"hidden": 30000}'},
            r"has weights .*float32\[30000\].*, expected .*float32\[120000, 30002\]",
        ),
        (
            {"log_lr": torch.ones(2)},
            {
                "kind": "hyperparameters",
                "config": json.dumps({"shapes": {"a": [10**12]}, "lr": 0.1, "momentum": 0.0, "per": "coordinate"}),
            },
            r"expected .*float32\[1000000000000\]",
        ),
        ({"weight": torch.ones(2)}, {"config": "[1]"}, "config from which no 'linear' can be made"),
    ],
)
def test_a_foreign_file_is_refused(
    tmp_path: Path, tensors: dict[str, Tensor], about: dict[str, str], message: str
) -> None:
    with pytest.raises(fm.DataError, match=message):
        learned.load(written(tmp_path / "o", tensors, **{**GOOD, **about}))


def test_a_file_that_is_no_such_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(fm.DataError, match=r"does not exist\. Pass a file"):
        learned.load(tmp_path / "missing")
    torch.save({"weight": torch.ones(2)}, tmp_path / "pickle")
    with pytest.raises(fm.DataError, match="cannot be read as safetensors"):
        learned.load(tmp_path / "pickle")
    learned.save(learned.lstm(), tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    for length in (0, 5, 100, len(content) - 1):
        (tmp_path / "part").write_bytes(content[:length])
        with pytest.raises(fm.DataError, match="cannot be read as safetensors"):
            learned.load(tmp_path / "part")
    save_file({"weight": torch.ones(2)}, tmp_path / "bare")
    with pytest.raises(fm.DataError, match="expected 'funcmeta'"):
        learned.load(tmp_path / "bare")


def test_what_can_not_be_written_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(fm.ArgumentError, match=r"expected a LearnedOptimizer\. Save other modules"):
        learned.save(nn.Linear(1, 1), tmp_path / "o")
    strange = Own()
    strange.config = {"lr": torch.ones(1)}
    with pytest.raises(fm.ArgumentError, match=r"config of Own cannot be written as JSON: .* Keep numbers"):
        learned.save(strange, tmp_path / "o")
    tied = Own()
    tied.other = tied.lr
    with pytest.raises(fm.ArgumentError, match=r"weights that safetensors does not write: .* Untie them"):
        learned.save(tied, tmp_path / "o")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(fm.DataError, match=r"is a folder\. Pass a file"):
        learned.load(tmp_path)


def test_a_write_that_fails_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "o"
    learned.save(learned.linear(gradient=-0.5), path)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save", full)
    with pytest.raises(OSError, match="no space left"):
        learned.save(learned.linear(gradient=-0.7), path)
    monkeypatch.undo()
    assert learned.load(path).config["gradient"] == -0.5
    assert [each.name for each in tmp_path.iterdir()] == ["o"]


def test_the_optimizer_that_comes_with_the_library() -> None:
    optimizer = learned.pretrained()
    assert optimizer.kind == "lstm"
    assert sum(weight.numel() for weight in optimizer.parameters()) == 5141
    with pytest.raises(fm.ArgumentError, match="name is 'adam', expected one of"):
        learned.pretrained("adam")


def test_it_beats_the_best_adam_on_quadratics_it_has_not_seen() -> None:
    class Point(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.theta = nn.Parameter(torch.zeros(10))

    def loss(meta: Any, predict: Any, batch: Any) -> Tensor:
        W, y = batch
        return (W @ predict.params["theta"] - y).square().sum()

    def start(seed: int) -> dict[str, Tensor]:
        return {"theta": torch.randn(10, generator=torch.Generator().manual_seed(seed))}

    course = fm.Course(Point(), loss, fm.tasks.quadratics(10), 100, start)
    ours, adam = fm.evaluate_optimizers(
        {"LSTM": learned.pretrained()},
        {"held out": course},
        baselines={"Adam": fm.optim.adam},
        rates=(0.1, 0.215, 0.464, 1.0, 2.15, 4.64),
        tasks=64,
        seed=77,
    ).rows
    assert ours.median < 0.5 * adam.median
    assert ours.high < adam.high
