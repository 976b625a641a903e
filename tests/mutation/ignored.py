"""The operator "the argument is ignored": every public parameter and field, made to have no effect.

A parameter with a default always takes it; one without keeps the value of the first call, so that a test has to use two
objects that can be told apart. Fields of dataclasses and NamedTuples are parameters of their constructor.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

RECORD = 'getattr(__import__("builtins"), "_reached", len)'
"""What an instrumented function calls with its name; without a recorder, as in a subprocess, it does nothing."""

FIELD = """

def _ignore(cls, name, method, default):
    import functools, inspect

    original, first = getattr(cls, method), []
    signature = inspect.signature(original)

    @functools.wraps(original)
    def made(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        if name in bound.arguments:
            first.append(bound.arguments[name])
            bound.arguments[name] = default if default is not inspect.Parameter.empty else first[0]
        return original(*bound.args, **bound.kwargs)

    setattr(cls, method, made)


_ignore({cls}, {name!r}, {method!r}, __import__("inspect").signature({cls}).parameters[{name!r}].default)
"""

MADE = """

def _report(cls, method, key):
    import functools

    original = getattr(cls, method)

    @functools.wraps(original)
    def made(*args, **kwargs):
        {record}(key)
        return original(*args, **kwargs)

    setattr(cls, method, made)


_report({cls}, {method!r}, {key!r})
"""


class Ignored(NamedTuple):
    """A parameter of a function, or a field of a class, that is to have no effect."""

    file: str
    owner: str
    name: str

    def __str__(self) -> str:
        """The parameter as one would look for it."""
        return f"{self.file}: {self.owner}({self.name})"


class _Owner(NamedTuple):
    """A function or class with parameters: its qualified name, their names, and the defaults as source or None."""

    name: str
    node: ast.FunctionDef | ast.ClassDef
    parameters: dict[str, str | None]


def parameters(copy: Path, module: str) -> list[Ignored]:
    """Every public parameter and field of a package or module."""
    path = copy / module
    files = [path] if path.is_file() else sorted(path.rglob("*.py"))
    exported = _exported(copy)
    return [
        Ignored(str(file.relative_to(copy)), owner.name, name)
        for file in files
        for owner in _owners(ast.parse(file.read_text()))
        if not file.stem.startswith("_") or (file, owner.name.partition(".")[0]) in exported or _is_command(owner.node)
        for name in owner.parameters
    ]


def _exported(copy: Path) -> set[tuple[Path, str]]:
    """The names that a package takes out of its private modules, with the file of each."""
    return {
        (copy.joinpath(*node.module.split(".")).with_suffix(".py"), alias.name)
        for file in (copy / "funcmeta").rglob("__init__.py")
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }


def _is_command(node: ast.AST) -> bool:
    """Whether the parameters are options of the command line."""
    return isinstance(node, ast.FunctionDef) and "typer." in ast.unparse(node.args)


def without(copy: Path, place: Ignored) -> str:
    """The code of the file in which the parameter is ignored."""
    code = (copy / place.file).read_text()
    owner = next(each for each in _owners(ast.parse(code)) if each.name == place.owner)
    if isinstance(owner.node, ast.ClassDef):
        return code + FIELD.format(cls=place.owner, name=place.name, method=_constructor(owner.node))
    default = owner.parameters[place.name]
    if default is None:
        key = f"_ignored_{place.name}"
        first = f'__import__("builtins").__dict__.setdefault({key + place.owner!r}, {place.name})'
        return _inserted(code, owner.node, f"{place.name} = {first}")
    return _inserted(code, owner.node, f"{place.name} = {default}")


def instrumented(code: str, file: str) -> str:
    """The code, in which every owner of parameters reports that it was reached."""
    for owner in reversed(list(_owners(ast.parse(code)))):
        key = f"{file}: {owner.name}"
        if isinstance(owner.node, ast.FunctionDef):
            code = _inserted(code, owner.node, f"{RECORD}({key!r})")
        else:
            code += MADE.format(record=RECORD, cls=owner.name, method=_constructor(owner.node), key=key)
    return code


def _constructor(node: ast.ClassDef) -> str:
    return "__new__" if "NamedTuple" in map(ast.unparse, node.bases) else "__init__"


def _owners(module: ast.Module) -> Iterator[_Owner]:
    """The public functions, methods and classes with fields, in the order of the file."""
    for node in module.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield _function(node, node.name)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            bases = set(map(ast.unparse, node.bases))
            if "Protocol" in bases:
                continue
            decorators = " ".join(map(ast.unparse, node.decorator_list))
            if "NamedTuple" in bases or "dataclass" in decorators:
                fields = {
                    each.target.id: None if each.value is None else ast.unparse(each.value)
                    for each in node.body
                    if isinstance(each, ast.AnnAssign) and "ClassVar" not in ast.unparse(each.annotation)
                    if isinstance(each.target, ast.Name) and not each.target.id.startswith("_")
                    if "init=False" not in (ast.unparse(each.value) if each.value else "")
                }
                yield _Owner(node.name, node, fields)
            for each in node.body:
                if isinstance(each, ast.FunctionDef) and (not each.name.startswith("_") or each.name == "__init__"):
                    yield _function(each, f"{node.name}.{each.name}")


def _function(node: ast.FunctionDef, name: str) -> _Owner:
    positional = [*node.args.posonlyargs, *node.args.args]
    defaults = [None] * (len(positional) - len(node.args.defaults)) + [ast.unparse(each) for each in node.args.defaults]
    found = {each.arg: default for each, default in zip(positional, defaults, strict=True)}
    for each, value in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
        found[each.arg] = None if value is None else ast.unparse(value)
    return _Owner(name, node, {key: value for key, value in found.items() if key not in ("self", "cls")})


def _inserted(code: str, function: ast.FunctionDef, statement: str) -> str:
    """The code with a statement before the first of a function that is not its docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    lines = code.splitlines(keepends=True)
    if not body or body[0].lineno == function.lineno:  # an abstract method, or all on one line
        return code
    at, indent = body[0].lineno - 1, " " * body[0].col_offset
    if isinstance(body[0], ast.FunctionDef | ast.ClassDef) and body[0].decorator_list:
        at = body[0].decorator_list[0].lineno - 1
    lines.insert(at, f"{indent}{statement}\n")
    return "".join(lines)
