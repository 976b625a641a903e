"""Distributions of tasks: a task is a pure function of its seed."""

from funcmeta.tasks._few_shot import FewShot
from funcmeta.tasks._task import Sampler, Task, stack
from funcmeta.tasks.articles import Article, pydoc_articles, wikipedia_articles, wikitext_articles
from funcmeta.tasks.corpus import Corpus, Streams, corpus, split
from funcmeta.tasks.glyphs import glyphs
from funcmeta.tasks.mnist1d import mnist1d
from funcmeta.tasks.omniglot import omniglot, omniglot_runs
from funcmeta.tasks.quadratics import quadratics
from funcmeta.tasks.sinusoids import sinusoids

__all__ = [
    "Article",
    "Corpus",
    "FewShot",
    "Sampler",
    "Streams",
    "Task",
    "corpus",
    "glyphs",
    "mnist1d",
    "omniglot",
    "omniglot_runs",
    "pydoc_articles",
    "quadratics",
    "sinusoids",
    "split",
    "stack",
    "wikipedia_articles",
    "wikitext_articles",
]
