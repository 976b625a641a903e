"""Distributions of tasks: a task is a pure function of its seed."""

from funcmeta.tasks._few_shot import FewShot
from funcmeta.tasks._task import Sampler, Task, stack
from funcmeta.tasks.glyphs import glyphs
from funcmeta.tasks.quadratics import quadratics
from funcmeta.tasks.sinusoids import sinusoids

__all__ = ["FewShot", "Sampler", "Task", "glyphs", "quadratics", "sinusoids", "stack"]
