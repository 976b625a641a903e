"""Distributions of tasks: a task is a pure function of its seed."""

from funcmeta.tasks._few_shot import FewShot
from funcmeta.tasks._task import Sampler, Task, stack
from funcmeta.tasks.glyphs import glyphs
from funcmeta.tasks.mnist1d import mnist1d
from funcmeta.tasks.omniglot import omniglot, omniglot_runs
from funcmeta.tasks.quadratics import quadratics
from funcmeta.tasks.sinusoids import sinusoids

__all__ = [
    "FewShot",
    "Sampler",
    "Task",
    "glyphs",
    "mnist1d",
    "omniglot",
    "omniglot_runs",
    "quadratics",
    "sinusoids",
    "stack",
]
