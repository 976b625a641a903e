"""Trees in files: tensors as safetensors, everything else as JSON in the same file, under one checksum."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from funcmeta._errors import DataError, SaveError
from funcmeta._files import tensors_in, written
from funcmeta.training._codec import decode, encode

VERSION = 1


def write(path: Path, kind: str, value: Any) -> None:
    """Put a tree into a file, which appears whole or not at all.

    Raises:
        ArgumentError: the tree holds what cannot be written.
        SaveError: the system does not take the file.
    """
    skeleton, tensors = encode(value)
    about = {"version": VERSION, "kind": kind, "tree": skeleton, "sha256": _checksum(skeleton, tensors)}
    content = safetensors.torch.save(tensors, {"funcmeta": json.dumps(about, allow_nan=False)})
    put(path, content)


def put(path: Path, content: bytes) -> None:
    """Write bytes to a file, whole or not at all."""
    with reported(path), written(path) as file:
        file.write(content)


def append(path: Path, content: bytes) -> None:
    """Add bytes to the end of a file."""
    with reported(path), open(path, "ab") as file:
        file.write(content)


@contextmanager
def reported(path: Path) -> Iterator[None]:
    """Say what the system does not take as a ``SaveError``."""
    try:
        yield
    except OSError as error:
        raise SaveError(
            f"{path} could not be written: {error.strerror or error}. What was saved before is whole: make room, or "
            f"give a folder that can be written to, and go on with resume=True (--resume)."
        ) from error


def read(path: Path, kind: str) -> Any:
    """The tree of a file that ``write`` made.

    Raises:
        DataError: the file is missing, truncated, damaged, of another kind or of another version.
    """
    metadata, tensors = tensors_in(path, advice="Pass a file that funcmeta.training wrote.")
    try:
        about = json.loads(metadata["funcmeta"])
        version, found, skeleton, checksum = (about[key] for key in ("version", "kind", "tree", "sha256"))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is a safetensors file, but none of a run of funcmeta. Pass a file that funcmeta.training wrote."
        ) from error
    if version != VERSION or found != kind:
        raise DataError(
            f"{path} holds a {found!r} in version {version!r} of the format, expected a {kind!r} in version {VERSION}. "
            f"Pass the file of this run, or read it with the version of funcmeta that wrote it."
        )
    try:
        if checksum != _checksum(skeleton, tensors):
            raise DataError(f"{path} is damaged: its content does not have the checksum that was written with it.")
        return decode(skeleton, tensors)
    except DataError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{path} is damaged: {error}. Pass a file that funcmeta.training wrote.") from error


def _checksum(skeleton: Any, tensors: dict[str, Tensor]) -> str:
    found = hashlib.sha256(json.dumps(skeleton, allow_nan=False).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name}:{tensor.dtype}:{list(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
