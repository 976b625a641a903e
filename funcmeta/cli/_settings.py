"""What ``funcmeta train`` is told: options, a TOML file, and what each algorithm takes when neither says it."""

import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from funcmeta._check import check_count, check_positive
from funcmeta._errors import ArgumentError, DataError

CHANGEABLE = frozenset({"steps", "checkpoint_every", "threads", "alarm", "limit"})
"""What may differ when a run is resumed; everything else decides what is learned."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a run does; its ``config.toml`` has what it reads. 0 stands for none or never."""

    algorithm: str
    tasks: str = "glyphs"
    model: str = "conv4"
    ways: int = 5
    shots: int = 1
    queries: int = 5
    size: int = 16
    filters: int = 32
    inner_steps: int = 5
    inner_lr: float = 0.1
    estimator: str = "second"
    memory: str = "store"
    strategy: str = "vmap"
    optimizer: str = "lstm"
    window: int = 20
    vocabulary: int = 2000
    width: int = 64
    segment: int = 20
    static_epochs: int = 6
    steps: int = 1000
    batch_size: int = 4
    accumulate: int = 1
    meta_lr: float = 0.001
    schedule: str = "constant"
    clip: float = 0.0
    alarm: str = "stop"
    limit: float = 0.0
    validate_every: int = 100
    validation_tasks: int = 40
    patience: int = 0
    checkpoint_every: int = 100
    seed: int = 0
    dtype: str = "float32"
    threads: int = 1


_OUTER = frozenset(
    {"algorithm", "tasks", "steps", "batch_size", "accumulate", "meta_lr", "schedule", "clip", "alarm", "limit"}
    | {"validate_every", "validation_tasks", "patience", "checkpoint_every", "seed", "dtype", "threads"}
)
_FEW_SHOT = _OUTER | {"model", "ways", "shots", "queries", "size", "filters", "inner_steps", "strategy"}
_GRADIENT = frozenset({"estimator", "memory", "window"})

READS: dict[str, frozenset[str]] = {
    "maml": _FEW_SHOT | _GRADIENT | {"inner_lr"},
    "anil": _FEW_SHOT | _GRADIENT | {"inner_lr"},
    "meta_sgd": _FEW_SHOT | _GRADIENT | {"inner_lr"},
    "reptile": _FEW_SHOT | {"inner_lr"},
    "meta_lstm": _FEW_SHOT | _GRADIENT,
    "l2l": _OUTER | _GRADIENT | {"inner_steps", "strategy", "optimizer"},
    "dynamic_lm": _OUTER | _GRADIENT | {"vocabulary", "width", "segment", "static_epochs"},
}
"""The settings that each algorithm reads; any other that is given is refused."""

ALGORITHMS = tuple(READS)


def _kind(settings: Settings) -> str:
    return settings.estimator.partition(":")[0]


_IF: dict[str, tuple[str, Callable[[Settings], bool]]] = {
    "ways": ("tasks", lambda told: told.tasks != "sinusoids"),
    "size": ("tasks", lambda told: told.tasks != "sinusoids"),
    "filters": ("model", lambda told: told.model != "mlp"),
    "memory": ("estimator", lambda told: _kind(told) not in ("es", "pes")),
    "window": ("estimator", lambda told: told.algorithm in ("l2l", "dynamic_lm") or _kind(told) == "pes"),
    "validation_tasks": ("validate_every", lambda told: told.validate_every != 0),
    "patience": ("validate_every", lambda told: told.validate_every != 0),
}
"""Settings that are read only if another one allows it: which one, and whether it does."""


_OWN: dict[str, dict[str, Any]] = {
    "reptile": {"inner_lr": 0.05, "inner_steps": 10, "meta_lr": 0.01},
    "meta_lstm": {"estimator": "first", "inner_steps": 8},
    "l2l": {"tasks": "quadratics", "estimator": "first", "inner_steps": 100, "batch_size": 32, "clip": 1.0},
    "dynamic_lm": {"tasks": "pydoc", "estimator": "first", "window": 20, "batch_size": 1, "meta_lr": 0.01},
}
"""Defaults of an algorithm that differ from those of the table."""

_SINUSOIDS: dict[str, Any] = {"model": "mlp", "inner_lr": 0.01, "shots": 10, "queries": 10}
"""Defaults for these tasks, whatever the algorithm."""


def default(name: str) -> str:
    """What a setting is if nobody says it, in words."""
    usual = getattr(Settings, name)
    others = [(algorithm, own[name]) for algorithm, own in _OWN.items() if name in own]
    others += [("sinusoids", _SINUSOIDS[name])] if name in _SINUSOIDS else []
    listed = [str(usual), *(f"{who} {value}" for who, value in others if value != usual)]
    return f"Default: {', '.join(each.removesuffix('.0') for each in listed)}."


def settings(given: dict[str, Any], kept: Path | None) -> Settings:
    """What is given before what the folder of a run has kept, and that before the defaults.

    What was kept but is not read is left out: folders of earlier versions have every setting.

    Raises:
        ArgumentError: no algorithm or an unknown one, a setting is given that it does not read, an unknown name in
            the file, or a value out of range.
        DataError: the file cannot be read.
    """
    known = {**({} if kept is None else read(kept)), **given}
    algorithm = known.get("algorithm")
    if algorithm not in ALGORITHMS:
        raise ArgumentError(f"algorithm is {algorithm!r}, expected one of {', '.join(ALGORITHMS)}. Name one.")
    own = dict(_OWN.get(algorithm, {}))
    if known.get("tasks") == "sinusoids":
        own |= _SINUSOIDS
    told = Settings(**{**own, **known})
    names = reads(told)
    for name, value in given.items():
        if name not in names:
            other = _IF[name][0] if name in READS[algorithm] else None
            where = f" with {other} {getattr(told, other)!r}" if other else ""
            raise ArgumentError(
                f"{name} is {value!r}, which {algorithm} does not read{where}. It reads {', '.join(names)}. Leave "
                f"{name} out."
            )
    return _checked(Settings(**{name: value for name, value in {**own, **known}.items() if name in names}))


def reads(settings: Settings) -> list[str]:
    """The settings that a run with these reads, in their order."""
    names = [each.name for each in fields(Settings) if each.name in READS[settings.algorithm]]
    return [name for name in names if name not in _IF or _IF[name][1](settings)]


def read(file: Path) -> dict[str, Any]:
    """The names and values of a TOML file, each of a known name and the right type."""
    try:
        found = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as TOML: {error}. Pass a file like a run's config.toml.") from error
    types = {each.name: each.type for each in fields(Settings)}
    for name, value in found.items():
        if name not in types:
            raise ArgumentError(f"{file} sets {name!r}, which is no setting. Known are {', '.join(types)}.")
        fits = type(value) is types[name] or (types[name] is float and type(value) is int)
        if not fits:
            wanted = getattr(types[name], "__name__", types[name])
            raise ArgumentError(f"{file} sets {name} to {value!r}, expected a value of type {wanted}. Correct it.")
    return found


def text(settings: Settings) -> str:
    """Those that are read, as TOML."""
    import tomli_w

    return tomli_w.dumps({name: getattr(settings, name) for name in reads(settings)})


def check_resumed(now: Settings, before: Settings) -> None:
    """Raise where a resumed run would become another one."""
    changed = [
        f"{name} was {getattr(before, name)!r}, now {value!r}"
        for name, value in asdict(now).items()
        if name not in CHANGEABLE and value != getattr(before, name)
    ]
    if now.schedule == "cosine" and now.steps != before.steps:
        changed.append(
            f"steps was {before.steps}, now {now.steps}, but the cosine of the learning rate ends at the first"
        )
    if changed:
        raise ArgumentError(
            f"The run was begun with other settings: {'; '.join(changed)}. Resume it without them (only "
            f"{', '.join(sorted(CHANGEABLE))} may change), or begin another run in its own folder."
        )


def _checked(settings: Settings) -> Settings:
    positive = ("ways", "shots", "queries", "inner_steps", "window", "width", "segment", "static_epochs", "steps")
    for name in (*positive, "batch_size", "accumulate", "checkpoint_every", "threads"):
        check_count(name, getattr(settings, name))
    for name in ("validate_every", "patience", "seed"):
        check_count(name, getattr(settings, name), least=0)
    check_count("validation_tasks", settings.validation_tasks, least=2)
    for name in ("inner_lr", "meta_lr"):
        check_positive(name, getattr(settings, name))
    for name in ("clip", "limit"):
        if not getattr(settings, name) >= 0:
            raise ArgumentError(f"{name} is {getattr(settings, name)}, expected 0 for none, or a positive number.")
    for name, choices in {
        "schedule": ("constant", "cosine"),
        "alarm": ("stop", "skip", "lower"),
        "dtype": ("float32", "float64", "bfloat16"),
        "strategy": ("vmap", "loop"),
    }.items():
        if getattr(settings, name) not in choices:
            raise ArgumentError(f"{name} is {getattr(settings, name)!r}, expected one of {', '.join(choices)}.")
    return settings
