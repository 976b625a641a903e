"""What the fuzzing has found, each as its smallest example."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import funcmeta as fm
from funcmeta import learned, optim, tasks, training
from funcmeta.algorithms import dynamic_lm
from funcmeta.optim import schedules

W = {"w": torch.ones(2)}
ON_META = {"w": torch.ones(2, device="meta")}
NET = nn.Linear(1, 1)
READER, LETTERS = dynamic_lm.LanguageModel(9, 2), torch.arange(9)


def squares(meta: Any, predict: Any, batch: Any) -> Tensor:
    x, y = batch
    return ((predict(x) - y) ** 2).mean()  # type: ignore[no-any-return]


def step(meta: Any, w: Any, x: Tensor, seed: int) -> Any:
    loss, grads = fm.value_and_grad(lambda w: (w["w"] * x).sin().sum() + w["w"].sum())(w)
    return {"w": w["w"] - meta["lr"] * grads["w"]}, fm.StepInfo(loss)


PROBLEM = fm.Problem(lambda meta, task, seed: meta["p"], step, lambda meta, w, x, seed: (w["w"] * x).cos().sum())


def a_meta(size: int = 2, device: str = "cpu") -> dict[str, Any]:
    w = torch.linspace(0.1, 1, size, dtype=torch.float64, device=device)
    return {"p": {"w": w.requires_grad_()}, "lr": torch.tensor(0.1, dtype=torch.float64, requires_grad=True)}


X = torch.tensor(0.7, dtype=torch.float64)
TASK = fm.Task(X, X)


def unrolled(meta: Any = None, task: Any = TASK, problem: Any = PROBLEM, steps: int = 2, **options: Any) -> Any:
    return fm.unroll(problem, a_meta() if meta is None else meta, task, steps=steps, **options)


def updated(transform: fm.Transform, grads: Any = W, params: Any = W, state: Any = None) -> Any:
    return transform.update(grads, transform.init(params) if state is None else state, params)


def fitted(**options: Any) -> Any:
    algorithm = fm.maml.build(NET, squares, steps=1, lr=0.1, strategy="loop")
    keywords: dict[str, Any] = {"optimizer": lambda meta: torch.optim.SGD(meta["params"].values(), lr=0.1), **options}
    sampler = keywords.pop("tasks", tasks.sinusoids())
    return training.fit(algorithm, sampler, keywords.pop("optimizer"), steps=1, **keywords)


class Listing:
    """A sampler that forgets to stack, or counts wrongly."""

    def __init__(self, *, few: bool = False) -> None:
        self.few = few

    def sample_batch(self, seed: int, tasks: int) -> Any:
        batch = fm.tasks.sinusoids().sample_batch(seed, tasks - self.few)
        return batch if self.few else [batch]


class Drawing:
    """A sampler that does not follow from the seed."""

    def __init__(self) -> None:
        self.seeds = iter(range(99))

    def sample_batch(self, seed: int, tasks: int) -> Any:
        return fm.tasks.sinusoids().sample_batch(next(self.seeds), tasks)


def judged(**options: Any) -> Any:
    algorithm = fm.maml.build(NET, squares, steps=1, lr=0.1, strategy="loop")
    return training.evaluate(algorithm, algorithm.init(), tasks.sinusoids(), number=2, **options)


def restored(state_dict: Any) -> None:
    learned.TorchOptimizer(NET.parameters(), optim.adam()).load_state_dict(state_dict)


def share_on_meta(meta: Any, w: Any, x: Tensor, seed: int) -> Any:
    state, info = step(meta, w, x, seed)
    return state, info._replace(meta_loss=info.loss.to("meta"))


REFUSED: dict[str, tuple[Callable[[], Any], type[fm.FuncmetaError], str]] = {
    "updates that broadcast": (
        lambda: fm.apply_updates({"w": torch.ones(())}, W),
        fm.StructureError,
        r"updates\['w'\] is float32\[2\] on cpu, expected float32\[\] on cpu\. Pass what Transform.update returned",
    ),
    "updates on another device": (lambda: fm.apply_updates(W, ON_META), fm.StructureError, "is float32.* on meta, exp"),
    "integer parameters": (
        lambda: optim.sgd(0.1).init({"w": torch.ones(2, dtype=torch.int64)}),
        fm.StructureError,
        r"params\['w'\] is int64\[2\] on cpu, expected a dense floating-point tensor\. Keep others out",
    ),
    "complex parameters": (lambda: optim.adam().init({"w": torch.tensor(1j)}), fm.StructureError, "is complex64"),
    "gradients on another device": (lambda: updated(optim.sgd(0.1), ON_META), fm.StructureError, "on the same device"),
    "integer gradients": (lambda: updated(optim.adam(), {"w": torch.ones(2).long()}), fm.StructureError, "is int64"),
    "parameters that are none": (
        lambda: optim.sgd(0.1).update([torch.ones(2)], optim.sgd(0.1).init(W), [3]),
        fm.StructureError,
        r"a gradient is float32\[2\] on cpu, but its parameter is 3 \(int\)",
    ),
    "a state of another transform": (
        lambda: updated(optim.adam(), state=optim.sgd(0.1).init(W)),
        fm.StructureError,
        "state is a SgdState, expected the AdamState of this transform. Pass what its init",
    ),
    "a momentum that makes NaN of nothing": (
        lambda: optim.sgd(0.1, momentum=float("inf")),
        fm.ArgumentError,
        "momentum is inf, expected a number at least 0 and finite",
    ),
    "a dampening beyond floats": (
        lambda: optim.sgd(0.1, momentum=0.9, dampening=10**400),
        fm.ArgumentError,
        "dampening is ",
    ),
    "gradients of more than the parameters": (
        lambda: updated(optim.sgd(0.1), {"w": torch.ones(2), "b": torch.ones(2)}),
        fm.StructureError,
        r"grads has other keys than expected: .*grads\['b'\]",
    ),
    "a state without a count of steps": (
        lambda: updated(optim.sgd(0.1, momentum=0.9, dampening=0.5), {}, {}, optim.sgd(0.1).init({})),
        fm.StructureError,
        r"state is a SgdState with \(\) for the count of its steps, expected the SgdState of this transform",
    ),
    "a state of other parameters": (
        lambda: updated(optim.adam(), state=optim.adam().init({"w": torch.ones(1)})),
        fm.StructureError,
        r"the state's exp_avg is float32\[1\] on cpu, but its parameter is float32\[2\]",
    ),
    "no state of a chain": (
        lambda: updated(optim.chain(optim.scale(1.0), optim.sgd(0.1)), state=3),
        fm.StructureError,
        "state is a int, expected the ChainState of 2 transforms",
    ),
    "no state of a mask": (
        lambda: updated(optim.masked(optim.sgd(0.1), lambda name: True), state=3),
        fm.StructureError,
        "state is a int, expected a MaskedState",
    ),
    "no state of a clip": (
        lambda: updated(optim.clip_by_global_norm(0.1), state=3),
        fm.StructureError,
        "state is a int, expected the StepState",
    ),
    "no pair asked for by a word": (
        lambda: fm.value_and_grad(len, has_aux="no"),  # type: ignore[arg-type]
        fm.ArgumentError,
        "has_aux is 'no', expected True or False",
    ),
    "a class as batches": (
        lambda: unrolled(task=fm.Task(object, X)),
        fm.ArgumentError,
        "task.support is <class 'object'>, expected a function",
    ),
    "more steps than can be planned": (
        lambda: fm.plan(fm.Segments(), 2**70),
        fm.ArgumentError,
        "steps is 1180591620717411303424, expected less than 2",
    ),
    "a better that is no flag": (
        lambda: fitted(validation=training.Validation(tasks.sinusoids(), higher_is_better="no")),  # type: ignore[arg-type]
        fm.ArgumentError,
        "validation.higher_is_better is 'no', expected True or False",
    ),
    "a resumption that is no flag": (
        lambda: fitted(folder=training.Folder("never-made", resume="no")),  # type: ignore[arg-type]
        fm.ArgumentError,
        "resume is 'no', expected True or False",
    ),
    "a class as a schedule": (lambda: optim.sgd(nn.Linear), fm.ArgumentError, "expected a number, a floating-point"),
    "a norm over devices": (
        lambda: updated(optim.clip_by_global_norm(1.0), *[[torch.ones(2), torch.ones(2, device="meta")]] * 2),
        fm.StructureError,
        "the gradients are on cpu, meta, but their common norm is computed on one device. Use clip_by_norm",
    ),
    "a level that is none": (
        lambda: schedules.linear("a", 1.0, 3),
        fm.ArgumentError,
        r"start is 'a' \(str\), expected",
    ),  # type: ignore[arg-type]
    "a level of integers": (lambda: schedules.constant(torch.tensor(1)), fm.ArgumentError, r"value is int64\[\]"),
    "a schedule that is none": (lambda: schedules.warmup(3, 2), fm.ArgumentError, "schedule is 3, expected a callable"),  # type: ignore[arg-type]
    "a schedule of words": (lambda: schedules.warmup(lambda step: "a", 2)(0), fm.ArgumentError, r"schedule\(step\) is"),  # type: ignore[arg-type, return-value]
    "a state_dict that is none": (
        lambda: optim.from_torch_optim_state(optim.adam(), {"state": {}}, W),
        fm.ArgumentError,
        r"source is .*, expected an optimizer of torch.optim or its state_dict\(\)",
    ),
    "a target that is none": (
        lambda: optim.to_torch_optim_state(optim.adam().init(W), {}),
        fm.ArgumentError,
        "target is {}, expected an optimizer of torch.optim",
    ),
    "meta without data": (
        lambda: unrolled(a_meta(device="meta")),
        fm.ArgumentError,
        r"meta\['p'\]\['w'\] is float64\[2\] on meta, a device where tensors have no data\. Pass it on",
    ),
    "a state without data": (
        lambda: unrolled(
            problem=PROBLEM._replace(init=lambda meta, task, seed: ON_META), estimator=fm.MixedMode(), meta=a_meta()
        ),
        fm.ArgumentError,
        r"The state that init returned, state\['w'\] is float32\[2\] on meta, a device where",
    ),
    "a task without data": (lambda: unrolled(task=fm.Task(X.to("meta"), X)), fm.ArgumentError, r"task\[0\] is float64"),
    "batches without data": (
        lambda: unrolled(task=fm.Task(lambda index: X.to("meta"), X), memory=fm.Segments(1)),
        fm.ArgumentError,
        r"support\(0\)\[0\]\[0\] is float64\[\] on meta",
    ),
    "two devices in a step": (
        lambda: unrolled(task=fm.Task(lambda index: torch.ones(2, device="meta"), X)),
        fm.StructureError,
        "Tensors of two devices met in a function of the problem: .* Put meta, the batches and the query on one device",
    ),
    "a share without data": (
        lambda: unrolled(problem=PROBLEM._replace(step=share_on_meta)),
        fm.LossError,
        "The meta-loss share of step 0 is on the device 'meta', where tensors have no data",
    ),
    "a carry of no step": (lambda: unrolled(carry=fm.Carry({}, "1")), fm.ArgumentError, "carry.step is '1', expected"),  # type: ignore[arg-type]
    "a carry of no particles": (
        lambda: unrolled(carry=fm.Carry({}, 1, 3)),  # type: ignore[arg-type]
        fm.ArgumentError,
        "carry.particles is a int, expected Particles or None",
    ),
    "a function as estimator": (lambda: unrolled(estimator=optim.sgd), fm.ArgumentError, "estimator is <function sgd"),
    "a function in windows": (lambda: fm.Truncated(2, optim.sgd), fm.ArgumentError, "estimator is <function sgd"),  # type: ignore[arg-type]
    "states offloaded to nothing": (
        lambda: fm.Offload(fm.Segments(), "meta"),
        fm.ArgumentError,
        "device is 'meta', expected one that keeps tensors",
    ),
    "an array as strategy": (
        lambda: fm.unroll_batch(PROBLEM, a_meta(), TASK, steps=1, strategy=torch.ones(2)),  # type: ignore[arg-type]
        fm.ArgumentError,
        "strategy is tensor",
    ),
    "a loss that is none": (
        lambda: fm.inner_problem(NET, 3, optimizer=optim.sgd(0.1)),
        fm.ArgumentError,
        "loss_fn is 3",
    ),  # type: ignore[arg-type]
    "weights of words": (
        lambda: fm.unroll(
            fm.inner_problem(NET, squares, optimizer=optim.sgd(0.1), trajectory_loss=lambda step: "a"),  # type: ignore[arg-type, return-value]
            {"params": fm.init_params(NET)},
            tasks.sinusoids().sample(0),
            steps=1,
        ),
        fm.ArgumentError,
        r"trajectory_loss\(step\) is 'a', expected the weight",
    ),
    "inputs without data": (
        lambda: fm.inspect(NET, torch.ones(1, 1, device="meta")),
        fm.ArgumentError,
        r"inputs\[0\] is float32\[1, 1\] on meta, a device where tensors have no data",
    ),
    "a class in place of a loss": (
        lambda: fm.inner_problem(NET, nn.Linear, optimizer=optim.sgd(0.1)),  # type: ignore[arg-type]
        fm.ArgumentError,
        "loss_fn is <class .*Linear.*>, expected a function",
    ),
    "a class in place of a step": (
        lambda: unrolled(problem=PROBLEM._replace(step=object)),  # type: ignore[arg-type]
        fm.ArgumentError,
        "problem.step is <class 'object'>, expected a function",
    ),
    "a class that makes no optimizer": (lambda: fitted(optimizer=object), fm.ArgumentError, "optimizer is <class 'obj"),
    "a class in place of a transform": (
        lambda: fm.check_transform(nn.Linear, {"w": X}, hypers=3),  # type: ignore[arg-type]
        fm.ArgumentError,
        "transform is <class .*Linear.*>, expected a Transform, or a function",
    ),
    "a seed that is none": (lambda: fm.inspect(NET, torch.ones(1, 1), seed=0.5), fm.ArgumentError, "seed is 0.5, exp"),  # type: ignore[arg-type]
    "parameters of torch that are none": (
        lambda: learned.TorchOptimizer([NET.weight, 3], optim.adam()),  # type: ignore[list-item]
        fm.ArgumentError,
        "params cannot be optimized: .* Pass module.parameters",
    ),
    "a state_dict of nothing": (
        lambda: learned.TorchOptimizer(NET.parameters(), optim.adam()).load_state_dict({"state": {1: 2}}),
        fm.StructureError,
        "state_dict has not the param_groups of 2 parameters. Load what the same optimizer saved",
    ),
    "rates that are missing": (
        lambda: fm.meta_sgd.build(NET, squares, steps=1, lr=0.1).loss({"params": {}}, TASK),
        fm.StructureError,
        "expected 'lr' in it. Pass what",
    ),
    "a course without tasks": (
        lambda: fm.evaluate_optimizers({"sgd": optim.sgd(0.1)}, {"a": fm.Course(NET, squares, None)}),  # type: ignore[arg-type]
        fm.ArgumentError,
        r"courses\['a'\].tasks is a NoneType, expected a sampler",
    ),
    "a segment that is no pair": (
        lambda: dynamic_lm.build(READER, learned.gates()).adapt(
            dynamic_lm.build(READER, learned.gates()).init(), fm.Task(lambda index: None, None, (0,) * 4)
        ),
        fm.ArgumentError,
        r"the stream gave None \(NoneType\), expected a pair of int64",
    ),
    "a difference without data": (
        lambda: fm.finite_difference(lambda tree: tree["w"].sum(), ON_META, ON_META),
        fm.StructureError,
        "has no data",
    ),
    "an optimizer of other tensors": (
        lambda: fitted(optimizer=lambda meta: torch.optim.SGD(NET.parameters(), lr=0.1)),
        fm.ArgumentError,
        "The optimizer has 2 tensors that are not in meta, perhaps those of a module",
    ),
    "an optimizer of some leaves": (
        lambda: fitted(optimizer=lambda meta: torch.optim.SGD([meta["params"]["bias"]], lr=0.1)),
        fm.ArgumentError,
        r"meta\['params'\]\['weight'\] would never be learned: the optimizer has not got it",
    ),
    "a batch that is a list": (
        lambda: fitted(tasks=Listing()),
        fm.ArgumentError,
        "sample_batch returned a list, expect",
    ),
    "a batch of another number": (
        lambda: fitted(tasks=Listing(few=True)),
        fm.ArgumentError,
        r"sample_batch\(\d+, 4\) has a float32\[3, 10, 1\] on cpu, expected 4 tasks along the first dimension",
    ),
    "a sampler that draws anew": (
        lambda: fitted(tasks=Drawing()),
        fm.ReplayError,
        "The sampler gave two different batches for one seed",
    ),
    "a head that is no name": (
        lambda: fm.anil.build(NET, squares, head=len, steps=1, lr=0.1),  # type: ignore[arg-type]
        fm.ArgumentError,
        "head is <built-in function len>, with which none of",
    ),
    "adapting without parameters": (
        lambda: fm.maml.build(NET, squares, steps=1, lr=0.1).adapt(torch.ones(()), tasks.sinusoids().sample(0)),
        fm.StructureError,
        r"meta is float32\[\] on cpu, expected 'params' in it\. Pass what init\(\) gave",
    ),
    "a stack of nothing": (lambda: tasks.stack([3]), fm.ArgumentError, "tasks is list, expected a list of Task"),  # type: ignore[list-item]
    "no device": (lambda: tasks.glyphs(device="nowhere"), fm.ArgumentError, "device is 'nowhere', expected a device"),
    "a choice that is no word": (lambda: tasks.glyphs(split={}), fm.ArgumentError, "split is {}, expected one of"),  # type: ignore[arg-type]
    "saving what has no data": (
        lambda: training.save(ON_META, "never-written"),
        fm.ArgumentError,
        "w is on the device 'meta', which has no data",
    ),
    "saving what is sparse": (
        lambda: training.save({"w": torch.ones(2).to_sparse()}, "never-written"),
        fm.ArgumentError,
        "w is torch.sparse_coo, and only dense tensors are written",
    ),
    "a sparse level": (lambda: schedules.constant(torch.ones(2).to_sparse()), fm.ArgumentError, "value is sparse_coo"),
    "no path": (lambda: training.load(3), fm.ArgumentError, "path is 3, expected the path of a file"),  # type: ignore[arg-type]
    "watching by nothing": (
        lambda: fitted(watch=None),
        fm.ArgumentError,
        "watch is None, expected a list of functions",
    ),
    "no alarm": (lambda: fitted(alarm=3), fm.ArgumentError, "alarm is 3, expected an Alarm"),
    "an alarm without a limit": (
        lambda: fitted(alarm=training.Alarm(limit="a")),  # type: ignore[arg-type]
        fm.ArgumentError,
        "alarm.limit is 'a', expected a positive number",
    ),
    "no sampler": (lambda: fitted(tasks=3), fm.ArgumentError, "tasks is a int, expected a sampler"),
    "a class as score": (lambda: judged(score=nn.Linear), fm.ArgumentError, "score is <class .*, expected a function"),
    "a score in a row": (
        lambda: judged(score=lambda predict, task: task.query[0]),
        fm.ArgumentError,
        r"score returned float32\[10, 1\] on cpu, expected a number\. Reduce it by mean",
    ),
    "no score": (lambda: judged(score=3), fm.ArgumentError, "score is 3, expected a function"),
    "no order": (
        lambda: fm.check_meta_grad(PROBLEM, a_meta(), TASK, steps=1, order=[]),  # type: ignore[arg-type]
        fm.ArgumentError,
        r"order is \[\], expected one of \[2, 4, 6\]",
    ),
    "sparse gradients": (
        lambda: updated(optim.adam(), {"w": torch.ones(2).to_sparse()}),
        fm.StructureError,
        r"a gradient is sparse_coo float32\[2\] on cpu, .* Pass one dense gradient",
    ),
    "sparse parameters": (
        lambda: optim.sgd(0.1).init({"w": torch.ones(2).to_sparse()}),
        fm.StructureError,
        r"params\['w'\] is sparse_coo float32\[2\] on cpu, expected a dense",
    ),
    "integers to be clipped": (
        lambda: optim.clip_by_global_norm(1.0).init({"w": torch.tensor(3)}),
        fm.StructureError,
        r"params\['w'\] is int64\[\] on cpu",
    ),
    "a rate on another device": (
        lambda: updated(optim.sgd(torch.ones((), device="meta"))),
        fm.StructureError,
        r"lr is float32\[\] on meta, but a parameter is float32\[2\] on cpu\. Move it there, or pass a 0-d tensor",
    ),
    "rates on another device": (lambda: updated(optim.sgd(ON_META)), fm.StructureError, r"lr is float32\[2\] on meta"),
    "a norm on another device": (
        lambda: updated(optim.clip_by_global_norm(torch.ones((), device="meta"))),
        fm.StructureError,
        r"max_norm is float32\[\] on meta",
    ),
    "a rate beyond what torch takes": (lambda: optim.sgd(10**400), fm.ArgumentError, r"lr is 10+ \(int\), expected"),
    "a level beyond it": (
        lambda: schedules.constant(10**400),
        fm.ArgumentError,
        r"value is 10+ \(int\), expected a num",
    ),
    "a count beyond it": (
        lambda: learned.lstm(hidden=2**70),
        fm.ArgumentError,
        r"hidden is at least 2\*\*63, expected",
    ),
    "a spread beyond it": (
        lambda: fm.EvolutionStrategies(10**400, 1),
        fm.ArgumentError,
        "sigma is 10+, expected a posi",
    ),
    "a rate of decay below zero": (
        lambda: schedules.exponential_decay(1.0, -0.5),
        fm.ArgumentError,
        "rate is -0.5, expected a positive number",
    ),
    "a class as a mask": (
        lambda: optim.masked(optim.sgd(0.1), nn.Linear).init(W),  # type: ignore[arg-type]
        fm.ArgumentError,
        "where is <class .*Linear'>, expected bools or a function of a name",
    ),
    "a model of nothing": (lambda: dynamic_lm.LanguageModel(0, 4), fm.ArgumentError, "vocabulary is 0, expected"),
    "static training of another model": (
        lambda: dynamic_lm.train_static(NET, LETTERS, LETTERS, epochs=1),  # type: ignore[arg-type]
        fm.ArgumentError,
        "net is a Linear, expected a LanguageModel",
    ),
    "a text of other numbers": (
        lambda: dynamic_lm.train_static(READER, LETTERS.float(), LETTERS, epochs=1),
        fm.StructureError,
        r"train is float32\[9\] on cpu, expected int64 \[words\]",
    ),
    "a text of unknown words": (
        lambda: dynamic_lm.train_static(READER, LETTERS, LETTERS + 1, epochs=1),
        fm.ArgumentError,
        "validation has words from 1 to 9, but the model knows 0 to 8. Give the model the vocabulary",
    ),
    "a stream that is none": (
        lambda: dynamic_lm.build(READER, learned.gates()).loss({}, None),  # type: ignore[arg-type]
        fm.ArgumentError,
        "task is None, expected a stream, whose spec has an entry for each segment",
    ),
    "a carry that is none": (
        lambda: dynamic_lm.build(READER, learned.gates()).loss({}, fm.Task(None, None, (0,) * 4), carry=3),  # type: ignore[arg-type]
        fm.ArgumentError,
        "carry is 3, expected a Carry or None",
    ),
    "an article of numbers": (
        lambda: tasks.corpus([tasks.Article("x", (1, 2))], [], []),  # type: ignore[arg-type]
        fm.ArgumentError,
        r"train\[0\] is Article\(title='x', words=\(1, 2\)\), expected an Article of words",
    ),
    "a sparse limit": (
        lambda: optim.clip_by_value(torch.ones(2).to_sparse()),
        fm.StructureError,
        r"limit is sparse_coo float32\[2\] on cpu, expected a dense floating-point tensor",
    ),
    "levels in a row": (lambda: schedules.constant(torch.ones(2)), fm.ArgumentError, "expected a number or a 0-d"),
    "a step of words": (
        lambda: schedules.constant(0.1)("a"),  # type: ignore[arg-type]
        fm.ArgumentError,
        r"step is 'a' \(str\), expected a number or a tensor",
    ),
    "a step that is none": (
        lambda: optim.from_torch_optim_state(optim.adam(), torch.optim.Adam([X]), X, step="a"),  # type: ignore[arg-type]
        fm.ArgumentError,
        "step is 'a', expected a whole number or None",
    ),
    "no transform": (
        lambda: optim.from_torch_optim_state(3, torch.optim.Adam([X]), X),  # type: ignore[arg-type]
        fm.ArgumentError,
        r"got 3 \(int\), expected a Transform",
    ),
    "the gradient by what is sparse": (
        lambda: fm.value_and_grad(lambda w: w.sum())(torch.ones(2).to_sparse()),
        fm.StructureError,
        r"params is sparse_coo float32\[2\] on cpu, expected a dense tensor",
    ),
    "more steps than can be counted": (
        lambda: unrolled(steps=2**70, estimator=fm.Truncated(2)),
        fm.ArgumentError,
        "steps is 1180591620717411303424, expected less than 2",
    ),
    "no problem": (lambda: unrolled(problem=X), fm.ArgumentError, r"problem is a Tensor, expected a Problem\. Pass"),
    "a problem without functions": (
        lambda: unrolled(problem=PROBLEM._replace(meta_loss=3)),  # type: ignore[arg-type]
        fm.ArgumentError,
        "problem.meta_loss is 3, expected a function",
    ),
    "a model without parameters": (
        lambda: fm.functionalize(NET)[0](None, {}, X),  # type: ignore[arg-type]
        fm.StructureError,
        "params is a NoneType, expected a dict of tensors by name",
    ),
    "a model with a number in it": (
        lambda: fm.functionalize(NET)[0]({**fm.init_params(NET), "bias": 1.0}, {}, X),  # type: ignore[dict-item]
        fm.StructureError,
        r"params\['bias'\] is 1.0 \(float\), expected a tensor",
    ),
    "a reference that is none": (
        lambda: fm.check_meta_grad(PROBLEM, a_meta(), TASK, steps=1, reference=len),  # type: ignore[arg-type]
        fm.ArgumentError,
        "reference is <built-in function len>, expected a MetaGradientCheck",
    ),
    "a state of words": (
        lambda: restored({"state": "a", "param_groups": [{"params": [0, 1]}]}),
        fm.StructureError,
        r"state_dict\['state'\] is 'a', expected 'funcmeta' with a list",
    ),
    "a state of a function": (
        lambda: restored({"state": {"funcmeta": {"leaves": len}}, "param_groups": [{"params": [0, 1]}]}),
        fm.StructureError,
        r"state_dict\['state'\] is a dict with the keys \['funcmeta'\], expected",
    ),
    "groups of numbers": (lambda: restored({"param_groups": [1.0]}), fm.StructureError, "has not the param_groups of"),
    "no optimizers": (
        lambda: fm.evaluate_optimizers(0, {}),  # type: ignore[arg-type]
        fm.ArgumentError,
        "optimizers is a int, expected a dict by name",
    ),
    "one rate": (
        lambda: fm.evaluate_optimizers({"sgd": optim.sgd(0.1)}, {"a": 3}, rates=0.1),  # type: ignore[arg-type, dict-item]
        fm.ArgumentError,
        "rates are 0.1, expected positive floats",
    ),
    "no course": (
        lambda: fm.evaluate_optimizers({"sgd": optim.sgd(0.1)}, {"a": 3}),  # type: ignore[dict-item]
        fm.ArgumentError,
        r"courses\['a'\] is 3, expected a Course\. Pass Course\(module, loss_fn, tasks, steps\)",
    ),
    "no variation": (lambda: tasks.glyphs(variation={}), fm.ArgumentError, "variation is {}, expected a number from"),  # type: ignore[arg-type]
    "a complex rate": (
        lambda: fm.meta_sgd.build(NET, squares, steps=1, lr=torch.tensor(1j)),  # type: ignore[arg-type]
        fm.ArgumentError,
        r"lr is tensor\(0\.\+1\.j\), expected a positive number",
    ),
    "folding words": (lambda: fm.rng.fold(0, "a"), fm.ArgumentError, r"numbers are \('a',\), expected integers"),  # type: ignore[arg-type]
    "no articles": (
        lambda: tasks.split(3, validation=1, test=1),  # type: ignore[arg-type]
        fm.ArgumentError,
        "articles is a int, expected a list of Article",
    ),
    "a sparse gate": (
        lambda: learned.gates(copy=torch.ones(2).to_sparse()),  # type: ignore[arg-type]
        fm.ArgumentError,
        r"(?s)copy is tensor.*, expected a number in \(0, 1\), or 1 to fix the gate",
    ),
    "a class as a curriculum": (
        lambda: fm.l2l.build(learned.linear(), NET, squares, steps=nn.Linear),  # type: ignore[arg-type]
        fm.ArgumentError,
        "steps is <class .*, expected a positive integer",
    ),
    "no tasks of a learned optimizer": (
        lambda: fm.l2l.build(learned.linear(), NET, squares, steps=2).begin({"optimizer": {}}, None),  # type: ignore[arg-type]
        fm.FuncmetaError,
        "expected",
    ),
    "a class as an optimizer": (
        lambda: fm.evaluate_optimizers({"a": nn.Linear}, {"a": fm.Course(NET, squares, tasks.sinusoids(), 1)}),  # type: ignore[dict-item]
        fm.ArgumentError,
        r"optimizers\['a'\] is <class .*, expected a LearnedOptimizer",
    ),
    "a meta of nothing": (
        lambda: dynamic_lm.build(READER, learned.gates()).adapt((), fm.Task(lambda index: None, None, (0,) * 4)),
        fm.StructureError,
        r"meta is \(\), expected 'static' in it\. Pass what init\(\) gave",
    ),
    "no module": (
        lambda: fm.l2l.build(learned.linear(), None, squares, steps=1),  # type: ignore[arg-type]
        fm.ArgumentError,
        "module is a NoneType, expected a torch.nn.Module",
    ),
    "a list as reference": (
        lambda: fm.compare(PROBLEM, a_meta(), TASK, steps=1, reference=[]),  # type: ignore[arg-type]
        fm.ArgumentError,
        r"reference is \[\], expected one of the estimators' names",
    ),
    "a start that is none": (
        lambda: fm.l2l.build(learned.linear(), NET, squares, steps=1, start=[1.0]),  # type: ignore[arg-type]
        fm.ArgumentError,
        r"start is \[1.0\], expected a function from a seed",
    ),
    "a teacher that is none": (
        lambda: fm.l2l.build(learned.linear(), NET, squares, steps=1, teacher=3),  # type: ignore[arg-type]
        fm.ArgumentError,
        "teacher is 3, expected a Transform or None",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_was_an_error_of_torch_or_a_wrong_number_is_refused(name: str) -> None:
    call, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize("size", [0, 2])
def test_forward_mode_takes_leaves_and_states_without_entries(size: int) -> None:
    """A learned leaf of no entries was a reshape that torch refused, and so was a state without tensors."""
    meta = {**a_meta(size), "unmoved": torch.zeros(0, dtype=torch.float64)}
    got = torch.autograd.grad(unrolled(meta, estimator=fm.ForwardMode()).loss, [meta["p"]["w"], meta["lr"]])
    want = torch.autograd.grad(unrolled(meta).loss, [meta["p"]["w"], meta["lr"]])
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine, other)

    def idle(lr: Tensor, state: Any, x: Tensor, seed: int) -> Any:
        return state, fm.StepInfo(lr * x)

    problem = fm.Problem(lambda lr, task, seed: {}, idle, lambda lr, state, x, seed: lr**2)
    lr = torch.tensor(0.5, requires_grad=True)
    fm.unroll(problem, lr, fm.Task(X, X), steps=1, estimator=fm.ForwardMode()).loss.backward()
    assert lr.grad == 1.0


@pytest.mark.parametrize("transform", [optim.sgd(()), optim.adam(())], ids=["sgd", "adam"])
def test_no_parameters_take_a_step_of_none(transform: fm.Transform) -> None:
    """Rates like parameters that are none were looked for by name, and not found."""
    assert updated(transform, (), ())[0] == ()


def test_a_spread_that_rounding_takes_is_refused() -> None:
    """The difference of the losses was 0, and so was the gradient; before that 0 by 0."""
    with pytest.raises(fm.ArgumentError, match="sigma is 1e-200, which is lost where it is added to meta"):
        unrolled(estimator=fm.EvolutionStrategies(1e-200, 2))


def test_a_spread_whose_square_is_zero_has_its_gradient() -> None:
    w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    meta = {"p": {"w": w}, "lr": torch.tensor(0.1, dtype=torch.float64)}
    tiny, small = (unrolled(meta, estimator=fm.EvolutionStrategies(size, 4)).loss for size in (1e-200, 1e-9))
    assert bool(torch.autograd.grad(tiny, w)[0].isfinite().all())
    assert bool(torch.autograd.grad(small, w)[0].all())


def test_a_budget_counts_what_is_made_of_sparse_tensors() -> None:
    rows = torch.eye(2, dtype=torch.float64).to_sparse()

    def pull(meta: Any, w: Any, x: Tensor, seed: int) -> Any:
        state, info = step(meta, w, x, seed)
        return {"w": torch.sparse.mm(rows, state["w"][:, None])[:, 0]}, info

    out = unrolled(problem=PROBLEM._replace(step=pull), memory=fm.budget(10**7))
    torch.testing.assert_close(out.loss, unrolled().loss)


def test_a_limit_beyond_a_dtype_clips_nothing() -> None:
    grads = {"w": torch.ones(2, dtype=torch.float16)}
    assert updated(optim.clip_by_value(1e6), grads, grads)[0]["w"].tolist() == [1, 1]


def test_a_number_of_numpy_is_a_number() -> None:
    """Its product with a tensor is no tensor."""
    mine = updated(optim.rmsprop(0.1, momentum=np.float64(0.5)))[0]["w"]
    torch.testing.assert_close(mine, updated(optim.rmsprop(0.1, momentum=0.5))[0]["w"])


def test_a_double_hyper_parameter_with_entries_keeps_the_dtype() -> None:
    """It promotes the gradient, which torch.lerp does not take together with a state in single precision."""
    params = {"w": torch.ones(2)}
    decay = torch.full((1,), 0.5, dtype=torch.float64)
    (mine, state), (other, _) = (updated(optim.adam(weight_decay=each), params, params) for each in (decay, 0.5))
    assert mine["w"].dtype == state.exp_avg["w"].dtype == torch.float32
    torch.testing.assert_close(mine["w"], other["w"])


@pytest.mark.parametrize("value", ["no", 1, None, torch.tensor(True)])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda value: fm.optim.sgd(0.1, maximize=value), "maximize"),
        (lambda value: fm.optim.lion(0.1, maximize=value), "maximize"),
        (lambda value: fm.optim.sgd(0.1, momentum=0.9, nesterov=value), "nesterov"),
        (lambda value: fm.optim.rmsprop(0.1, centered=value), "centered"),
        (lambda value: fm.optim.adam(0.1, amsgrad=value), "amsgrad"),
        (lambda value: fm.optim.adam(0.1, decoupled_weight_decay=value), "decoupled_weight_decay"),
        (lambda value: fm.optim.nadam(0.1, decoupled_weight_decay=value), "decoupled_weight_decay"),
    ],
)
def test_a_flag_is_true_or_false(make: Any, name: str, value: Any) -> None:
    """A text such as "no" counts as True, so that descent became ascent."""
    with pytest.raises(fm.ArgumentError, match=f"{name} is .*, expected True or False"):
        make(value)


def test_modes_are_flags_too() -> None:
    net = torch.nn.Linear(1, 1)
    with pytest.raises(fm.ArgumentError, match="train is 'yes', expected True, False or None"):
        fm.inner_problem(
            net, lambda meta, predict, batch: predict(batch).sum(), optimizer=fm.optim.sgd(0.1), train="yes"
        )
    with pytest.raises(fm.ArgumentError, match="learn_start is 'no', expected True or False"):
        fm.l2l.build(
            fm.learned.linear(), net, lambda meta, predict, batch: predict(batch).sum(), steps=4, learn_start="no"
        )


@pytest.mark.parametrize("lr", [1e30, {"w": 1e30}, lambda step: 1e30], ids=["number", "tree", "schedule"])
def test_a_rate_beyond_half_precision_is_infinite_in_it(lr: Any) -> None:
    params, grads = {"w": torch.ones(2, dtype=torch.float16)}, {"w": torch.ones(2, dtype=torch.float16)}
    transform = optim.sgd(lr)
    state = transform.init(params)
    moved, _ = optim.advance(transform, grads, state, params)
    assert moved["w"].tolist() == [-float("inf")] * 2
    updates, _ = transform.update(grads, state, params)
    assert torch.equal(fm.apply_updates(params, updates)["w"], moved["w"])


def test_a_clip_at_infinity_clips_nothing() -> None:
    huge = {"w": torch.tensor([1e30, 1.0])}
    for clip in (optim.clip_by_norm, optim.clip_by_global_norm, optim.clip_by_value):
        for limit in (float("inf"), torch.tensor(float("inf"))):
            assert torch.equal(updated(clip(limit), huge)[0]["w"], huge["w"])


def test_a_norm_that_half_precision_does_not_hold_squared() -> None:
    grads = {"w": torch.tensor([300.0, 1.0], dtype=torch.float16)}
    for clip in (optim.clip_by_norm, optim.clip_by_global_norm):
        assert torch.equal(updated(clip(1e4), grads, grads)[0]["w"], grads["w"])
        torch.testing.assert_close(updated(clip(3.0), grads, grads)[0]["w"], grads["w"] / 100, rtol=2e-3, atol=0)


def test_squares_are_taken_in_the_wider_precision() -> None:
    """1e-3² is 0 in half precision."""
    params, grads = {"w": torch.ones(2)}, {"w": torch.full((2,), 1e-3, dtype=torch.float16)}
    for make in (optim.adam, optim.rmsprop):
        state = make().init(params)
        got, _ = make().update(grads, state, params)
        expected, _ = make().update({"w": grads["w"].float()}, state, params)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("make", "theirs"),
    [
        (optim.adadelta, torch.optim.Adadelta),
        (optim.adam, torch.optim.Adam),
        (optim.nadam, torch.optim.NAdam),
        (optim.radam, torch.optim.RAdam),
        (optim.rmsprop, torch.optim.RMSprop),
    ],
)
@pytest.mark.parametrize("learned", [False, True])
def test_a_mean_square_that_overflowed_stays_infinite(make: Any, theirs: Any, learned: bool) -> None:
    """1e30² is infinite in single precision, and the difference of two infinities NaN."""
    one = {optim.adadelta: {"rho": torch.tensor(0.9)}, optim.rmsprop: {"alpha": torch.tensor(0.99)}}
    keeps = one.get(make, {"betas": (torch.tensor(0.9), torch.tensor(0.999))}) if learned else {}
    transform, grads = make(eps=0.0, **keeps), {"w": torch.tensor([1e30, 1.0])}
    params: Any = {"w": torch.ones(2)}
    state = transform.init(params)
    own = torch.ones(2, requires_grad=True)
    reference = theirs([own], lr=1.0 if make is optim.adadelta else make.__defaults__[0], eps=0.0, foreach=False)
    own.grad = grads["w"].clone()
    for _ in range(8):
        params, state = optim.advance(transform, grads, state, params)
        reference.step()
        torch.testing.assert_close(params["w"], own.detach(), equal_nan=True)
        assert bool(params["w"].isfinite().all())


def test_a_mean_square_in_half_precision_is_the_same_with_a_learned_rate() -> None:
    """300² is infinite in half precision, a thousandth of it is not."""
    grads = {"w": torch.full((2,), 300.0, dtype=torch.float16)}
    for beta2 in (0.999, torch.tensor(0.999, dtype=torch.float64)):
        _, state = updated(optim.adam(betas=(0.9, beta2)), grads, grads)
        torch.testing.assert_close(
            state.exp_avg_sq["w"], torch.full((2,), 90.0, dtype=torch.float16), rtol=1e-2, atol=0
        )
