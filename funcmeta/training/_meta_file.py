"""What was learned, in a file."""

from pathlib import Path

from funcmeta import tree
from funcmeta._check import check_path
from funcmeta._typing import Meta
from funcmeta.training import _tree_file


def save(meta: Meta, path: str | Path) -> None:
    """Write what was learned to a file: tensors as safetensors, the structure as JSON in its metadata.

    The file appears whole or not at all.

    Args:
        meta: any tree of tensors.
        path: where to write; an existing file is replaced.

    Raises:
        StructureError: a leaf of ``meta`` is not a tensor.
        ArgumentError: a container of ``meta`` is none that can be written, or ``path`` is none.
        SaveError: the system does not take the file.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save({"lr": torch.tensor(0.5)}, f"{folder}/meta.safetensors")
        ...     load(f"{folder}/meta.safetensors")
        {'lr': tensor(0.5000)}

    Source: the safetensors format (https://huggingface.co/docs/safetensors).
    """
    tree.check_tensors(meta, name="meta")
    _tree_file.write(check_path(path), "meta", meta)


def load(path: str | Path) -> Meta:
    """Read what ``save`` or a run wrote. Nothing in the file is executed.

    Args:
        path: a ``meta.safetensors``.

    Returns:
        The tree, on the CPU; leaves that were learned require grad.

    Raises:
        DataError: the file is missing, truncated, damaged, of something else or of another version, or it needs a
            NamedTuple that no imported module has.

    Examples:
        >>> load("nowhere.safetensors")
        Traceback (most recent call last):
        ...
        funcmeta._errors.DataError: nowhere.safetensors does not exist. Pass a file that funcmeta.training wrote.

    Source: the safetensors format (https://huggingface.co/docs/safetensors).
    """
    return _tree_file.read(check_path(path), "meta")
