"""Imports go down the layers, or sideways without a circle; and importing funcmeta brings no optional dependency."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

LAYERS = (
    ("_typing", "_errors", "_check", "_files", "_machine", "tree", "rng"),
    (
        *("_batching", "_context", "_draws", "_duals", "_exact_layers", "_gradient", "_graph", "_live_bytes"),
        *("_lost_order", "_lowering", "_lowering_checks", "_mixed", "_module_copies", "_split", "_structure"),
        *("_structure_parts", "_structure_places", "_structure_walk", "_task_reads", "_value_key", "_watch"),
        *("_writes", "model", "optim", "linear_solve", "tasks"),
    ),
    ("learned", "problem", "memory"),
    ("compiled", "estimators"),
    ("unroll", "unroll_batch", "_guard", "_remembered", "_same_by_vmap"),
    ("algorithms", "compare", "evaluation", "horizon", "inspect", "testing", "compat"),
    ("training", "cli"),
    ("__init__", "__main__"),
)
"""From the bottom to the top: the modules and packages of funcmeta, by their first name below it."""

OPTIONAL = ("typer", "rich", "matplotlib", "PIL", "tomli_w", "torchopt", "hypothesis", "tensorboard")

PACKAGE = Path(__file__).parents[1] / "funcmeta"


def module_name(path: Path, package: Path = PACKAGE) -> str:
    """The dotted name of a file, where a package is named by its ``__init__``."""
    return ".".join(path.relative_to(package.parent).with_suffix("").parts)


def sources() -> dict[str, str]:
    return {module_name(path): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}


def component(name: str) -> str:
    """The first name below funcmeta: ``funcmeta.optim.adam`` belongs to ``optim``."""
    return name.split(".")[1]


def requested(tree: ast.Module, name: str) -> Iterator[str]:
    """The absolute dotted names that a module asks for anywhere in its text, lazily or for type checking too."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=aliases):
                yield from (alias.name for alias in aliases)
            case ast.ImportFrom(module=module, names=aliases, level=level):
                parents = name.split(".")[:-level] if level else []
                base = ".".join([*parents, *([module] if module else [])])
                yield from (f"{base}.{alias.name}" for alias in aliases)
            case ast.Call(func=ast.Name(id="import_module" | "__import__"), args=[ast.Constant(value=str(text)), *_]):
                yield text
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(text)), *_]):
                yield text


def imported(source: str, name: str, known: frozenset[str]) -> set[str]:
    """The modules of funcmeta that a module imports, found from its source."""
    found = set()
    for request in requested(ast.parse(source), name):
        parts = request.split(".")
        while parts and parts[0] == "funcmeta":
            dotted = ".".join(parts)
            target = next((each for each in (dotted, f"{dotted}.__init__") if each in known), None)
            if target:
                found.add(target)
                break
            parts.pop()
    return found - {name}


def complaints(modules: Mapping[str, str]) -> list[str]:
    """What is wrong with the imports of these modules, one sentence each."""
    level = {name: index for index, layer in enumerate(LAYERS) for name in layer}
    strangers = sorted({component(name) for name in modules} - level.keys())
    if strangers:
        return [f"{name} stands in no layer: enter it in LAYERS of tests/test_layers.py" for name in strangers]
    known = frozenset(modules)
    edges = {name: imported(source, name, known) for name, source in modules.items()}
    found = [
        f"{name} (layer {level[component(name)]}) imports {target} "
        f"(layer {level[component(target)]}), which is above it"
        for name, targets in edges.items()
        for target in sorted(targets)
        if level[component(target)] > level[component(name)]
    ]
    between: dict[str, set[str]] = {}
    for name, targets in edges.items():
        between.setdefault(component(name), set()).update({component(each) for each in targets} - {component(name)})
    for graph in (edges, between):
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            found.append("imports in a circle: " + " <- ".join(error.args[1]))
    return found


def test_imports_keep_the_layers() -> None:
    assert complaints(sources()) == []


def test_every_layer_name_is_given_once() -> None:
    names = [name for layer in LAYERS for name in layer]
    assert len(names) == len(set(names))


UPWARD = {
    "top": "from funcmeta.estimators import Reverse",
    "plain": "import funcmeta.estimators as e",
    "member": "from funcmeta import estimators",
    "relative": "from . import estimators",
    "lazy": "def f():\n    from funcmeta.estimators import Reverse",
    "typing": "if TYPE_CHECKING:\n    from funcmeta.estimators import Reverse",
    "importlib": "importlib.import_module('funcmeta.estimators')",
}


@pytest.mark.parametrize("source", UPWARD.values(), ids=UPWARD.keys())
def test_an_upward_import_is_found(source: str) -> None:
    known = {"funcmeta.model": source, "funcmeta.estimators.__init__": "", "funcmeta.__init__": ""}
    assert "funcmeta.model (layer 1) imports funcmeta.estimators.__init__ (layer 3), which is above it" in (
        complaints(known)
    )


def test_the_package_itself_is_above_its_modules() -> None:
    found = complaints({"funcmeta.model": "import funcmeta as fm", "funcmeta.__init__": ""})
    assert found == ["funcmeta.model (layer 1) imports funcmeta.__init__ (layer 7), which is above it"]


def test_circles_are_found_between_modules_and_between_packages() -> None:
    pair = {"funcmeta.tree": "from funcmeta import rng", "funcmeta.rng": "from funcmeta.tree import map"}
    assert any("circle" in each for each in complaints(pair))
    inside = {"funcmeta.optim.__init__": "from .a import x", "funcmeta.optim.a": "from funcmeta.optim import y"}
    assert any("circle" in each for each in complaints(inside))
    packages = {
        "funcmeta.optim.a": "from funcmeta.tasks.a import x",
        "funcmeta.tasks.a": "",
        "funcmeta.tasks.b": "from funcmeta.optim.b import x",
        "funcmeta.optim.b": "",
    }
    assert any("circle" in each for each in complaints(packages))


def test_downward_and_sideways_imports_pass() -> None:
    fine = {
        "funcmeta.tree": "import torch",
        "funcmeta.optim.__init__": "from funcmeta.optim.adam import adam",
        "funcmeta.optim.adam": "from funcmeta import tree\nfrom funcmeta.model import init_params",
        "funcmeta.model": "from funcmeta.tree import map",
    }
    assert complaints(fine) == []


def test_a_module_outside_the_table_is_found() -> None:
    assert complaints({"funcmeta.brand_new": ""}) == [
        "brand_new stands in no layer: enter it in LAYERS of tests/test_layers.py"
    ]


def test_importing_funcmeta_brings_no_optional_dependency() -> None:
    script = f"import json, sys, funcmeta; print(json.dumps([each for each in {OPTIONAL} if each in sys.modules]))"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert json.loads(out) == []
