"""Every public name has a docstring in the shape that CONTRIBUTING.md shows, and its example runs."""

import ast
import dataclasses
import doctest
import enum
import importlib
import inspect
import re
import sys
import textwrap
import warnings
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch

import funcmeta as fm

MODULES = ("optim", "learned", "tasks", "algorithms", "testing", "memory", "estimators", "training")
SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Examples|Source):(.*)$", re.MULTILINE)
SINGULAR = re.compile(r"^(Example|Arguments|Parameters|Return|Raise|Sources|References?):", re.MULTILINE)


def modules() -> Iterator[ModuleType]:
    yield fm
    for name in MODULES:
        if importlib.util.find_spec(f"funcmeta.{name}"):
            yield importlib.import_module(f"funcmeta.{name}")


def public_objects() -> dict[str, Any]:
    """Each public object once, under the shortest name that reaches it; a submodule adds what it defines itself."""
    found: dict[int, tuple[str, Any]] = {}
    queue = list(modules())
    for module in queue:
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if isinstance(value, ModuleType):
                queue += [value] if value not in queue else []
            elif documented(value):
                found.setdefault(id(value), (f"{module.__name__}.{name}", value))
    return dict(found.values())


def documented(value: Any) -> bool:
    """Whether the object can carry a docstring of its own: functions and classes can, constants and aliases cannot."""
    return inspect.isfunction(value) or inspect.isclass(value)


def sections(text: str) -> dict[str, str]:
    """The text of each section of a docstring by its title; the text before the first one is called ``Summary``."""
    parts = SECTION.split(text)
    found = {"Summary": parts[0].strip()}
    for title, line, body in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        found[title] = textwrap.dedent(f"{line.strip()}\n{body}" if line.strip() else body.strip("\n")).strip()
    return found


def entries(section: str) -> set[str]:
    """The names that an ``Args`` or ``Attributes`` section explains; ``a, b: text`` explains both."""
    heads = re.findall(r"^([*\w]+(?:, [*\w]+)*)(?: \([^)]*\))?: *\S", section, re.MULTILINE)
    return {name.lstrip("*") for head in heads for name in head.split(", ")}


def parameters(value: Any) -> list[str]:
    """The names a caller can pass; none where the constructor is inherited from Python or from nn.Module."""
    if inspect.isclass(value):
        own = next(each for each in value.__mro__ if "__init__" in vars(each) or "__new__" in vars(each))
        named_tuple = issubclass(value, tuple) and hasattr(value, "_fields")
        if not named_tuple and not own.__module__.startswith("funcmeta"):
            return []
        if issubclass(value, enum.Enum) or getattr(value, "_is_protocol", False):
            return []
    return [name for name in inspect.signature(value).parameters if name != "self"]


def returns_something(function: Any) -> bool:
    return inspect.signature(function).return_annotation not in (None, "None")


def raised(function: Any) -> set[str]:
    """The exceptions that the body of a function names in a ``raise``, those of functions inside it left out."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    queue = list(tree.body)
    found = set()
    while queue:
        node = queue.pop()
        if isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            continue
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
            found.add(node.exc.func.id)
        queue += ast.iter_child_nodes(node)
    return {name for name in found if name[0].isupper()}


def inherited(value: Any, text: str) -> bool:
    """Whether the docstring is not the author's: dataclasses and NamedTuples write one when there is none."""
    generated = dataclasses.is_dataclass(value) or hasattr(value, "_fields")
    return generated and text.startswith(f"{value.__name__}(")


def bare_methods(cls: type) -> list[str]:
    """The public methods and properties written in a class whose docstring is missing or no sentence."""
    written = {
        name: getattr(member, "fget", None) or getattr(member, "__func__", None) or member
        for name, member in vars(cls).items()
        if not name.startswith("_") and isinstance(member, property | classmethod | staticmethod | FunctionType)
    }
    return [
        name
        for name, function in written.items()
        if function.__module__.startswith("funcmeta")
        and not any(overridden(base, name) for base in cls.__mro__[1:])
        and not (function.__doc__ or "").split("\n\n")[0].rstrip().endswith(".")
    ]


def overridden(base: type, name: str) -> bool:
    """Whether a method replaces one that its base has documented."""
    return bool(getattr(vars(base).get(name), "__doc__", None))


def complaints(value: Any) -> list[str]:
    """What the docstring of this object lacks, one sentence each."""
    text = inspect.cleandoc(vars(value).get("__doc__") or "" if inspect.isclass(value) else value.__doc__ or "")
    if not text or inherited(value, text):
        return ["there is no docstring"]
    found = [f"'{each}:' is not a section: write 'Examples:', 'Args:', ..." for each in SINGULAR.findall(text)]
    part = sections(text)
    if not text.split("\n")[0].endswith("."):
        found.append("the first line is not one sentence that ends with a period")
    explained = entries(part.get("Args", "")) | entries(part.get("Attributes", ""))
    missing = [name for name in parameters(value) if name not in explained]
    if missing:
        found.append(f"'Args:' (or 'Attributes:') leaves out {', '.join(missing)}")
    if inspect.isfunction(value):
        if returns_something(value) and not part.get("Returns"):
            found.append("'Returns:' is missing")
        silent = sorted(raised(value) - set(re.findall(r"^(\w+):", part.get("Raises", ""), re.MULTILINE)))
        if silent:
            found.append(f"'Raises:' leaves out {', '.join(silent)}")
    if inspect.isclass(value):
        found += [f"the method {name} has no first line that ends with a period" for name in bare_methods(value)]
    if ">>> " not in part.get("Examples", ""):
        found.append("'Examples:' has no line that starts with '>>> '")
    if not part.get("Source"):
        found.append("'Source:' is missing")
    return found


def run_examples(value: Any, name: str) -> list[str]:
    """What the doctests of an object print when they fail."""
    text = inspect.cleandoc(value.__doc__ or "")
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False)
    names = {**vars(sys.modules[value.__module__]), "fm": fm, "torch": torch}
    test = parser.get_doctest(text, names, name, None, 0)
    found: list[str] = []
    runner.run(test, out=found.append, clear_globs=False)
    return found


PUBLIC = public_objects()


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring_is_complete(name: str) -> None:
    found = complaints(PUBLIC[name])
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", PUBLIC)
def test_example_runs(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        printed = "".join(run_examples(PUBLIC[name], name))
    assert not printed, printed


def test_every_public_module_has_all_and_a_docstring() -> None:
    assert [module.__name__ for module in modules() if not (module.__doc__ and getattr(module, "__all__", None))] == []


def good(x: int, *, scale: float = 1.0) -> float:
    """Multiply.

    x · scale.

    Args:
        x: the number, an
            integer: any.
        scale: its factor.

    Returns:
        The product.

    Raises:
        ValueError: x is negative.

    Examples:
        >>> 2 * 3
        6

    Source: this library.
    """
    if x < 0:
        raise ValueError(x)
    return x * scale


def changed(old: str, new: str) -> Any:
    """The function ``good`` with another docstring."""

    def wrong(x: int, *, scale: float = 1.0) -> float:
        if x < 0:
            raise ValueError(x)
        return x * scale

    assert old in (good.__doc__ or "")
    wrong.__doc__ = (good.__doc__ or "").replace(old, new)
    return wrong


def test_a_good_docstring_passes() -> None:
    assert complaints(good) == []
    assert run_examples(good, "good") == []


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("Multiply.", "Multiply", "period"),
        ("        x: the number", "        y: the number", "leaves out x"),
        ("        scale: its factor.\n", "", "leaves out scale"),
        ("Returns:", "Note:", "'Returns:' is missing"),
        ("ValueError:", "KeyError:", "'Raises:' leaves out ValueError"),
        (">>>", "", "'Examples:' has no line"),
        ("Examples:", "Example:", "'Example:' is not a section"),
        ("Source:", "See", "'Source:' is missing"),
    ],
)
def test_a_bad_docstring_is_found(old: str, new: str, complaint: str) -> None:
    assert any(complaint in each for each in complaints(changed(old, new)))


def test_a_missing_docstring_is_found() -> None:
    @dataclasses.dataclass
    class Silent:
        length: int

    assert complaints(Silent) == ["there is no docstring"]


def test_a_bare_method_is_found() -> None:
    class Base:
        def shown(self) -> int:
            """Documented here."""
            return 1

    class Derived(Base):
        def shown(self) -> int:
            return 2

        def hidden(self) -> int:
            return 3

        @property
        def bare(self) -> int:
            return 4

    Derived.hidden.__module__ = Derived.bare.fget.__module__ = "funcmeta.made_up"
    assert bare_methods(Derived) == ["hidden", "bare"]


def test_a_failing_example_is_found() -> None:
    assert "Expected:" in "".join(run_examples(changed("        6", "        7"), "good"))
