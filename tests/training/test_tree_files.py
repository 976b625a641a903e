"""Trees in files: everything comes back as it was, and nothing else is read."""

import json
import os
import resource
import subprocess
import sys
from collections import Counter, OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

import funcmeta as fm
from funcmeta.training import _tree_file, load, save
from funcmeta.training._codec import decode, encode


class Pair(NamedTuple):
    left: Any
    right: Any


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]).map(lambda dtype: torch.ones(2, 3, dtype=dtype)),
    st.sampled_from([torch.tensor(3), torch.zeros(0, 2), torch.arange(6.0).view(2, 3).T, torch.ones(1).expand(4)]),
    st.just(torch.tensor([1.0, float("nan")])).map(lambda leaf: leaf.clone().requires_grad_()),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.one_of(st.text(max_size=3), st.integers()), inner, max_size=3),
        st.dictionaries(st.text(max_size=3), inner, max_size=3).map(OrderedDict),
        st.tuples(inner, inner).map(lambda pair: Pair(*pair)),
    ),
    max_leaves=8,
)


def same(left: Any, right: Any) -> bool:
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        equal = left.dtype == right.dtype and left.requires_grad == right.requires_grad
        return equal and torch.equal(left.nan_to_num(7), right.nan_to_num(7))
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right or (left != left and right != right)


@given(TREES)
def test_a_tree_comes_back(value: Any) -> None:
    skeleton, tensors = encode(value)
    assert same(decode(json.loads(json.dumps(skeleton, allow_nan=False)), tensors), value)


def test_a_file_comes_back_and_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    value = {"a/b": torch.ones(2), "a": {"b": torch.zeros(2)}, 3: [1.5, Counter({"x": 2})], "p": Pair(None, (True,))}
    _tree_file.write(tmp_path / "one", "checkpoint", value)
    _tree_file.write(tmp_path / "two", "checkpoint", value)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert same(_tree_file.read(tmp_path / "one", "checkpoint"), value)


def test_what_can_not_be_written() -> None:
    class Local(NamedTuple):
        value: int

    with pytest.raises(fm.ArgumentError, match=r"x/0 is a .*Local, which cannot be found by its name"):
        encode({"x": [Local(1)]})
    with pytest.raises(fm.ArgumentError, match=r"x is a set, which cannot be written to a file\. Keep tensors"):
        encode({"x": {1}})
    with pytest.raises(fm.ArgumentError, match="is a dict, which cannot be written"):
        encode({(1, 2): 3})


def test_meta_that_holds_other_things(tmp_path: Path) -> None:
    with pytest.raises(fm.StructureError, match=r"meta\['lr'\] is 0.1 \(float\), expected a tensor"):
        save({"lr": 0.1}, tmp_path / "meta")


def test_a_namedtuple_is_looked_up_and_not_imported(tmp_path: Path) -> None:
    for name in ("antigravity:Geohash", "os:system", "collections:OrderedDict", f"{__name__}:Pair.count"):
        with pytest.raises(fm.DataError, match=f"needs the NamedTuple {name} with 1 fields, and there is none"):
            decode({"named": name, "values": [1]}, {})
    with pytest.raises(fm.DataError, match="Pair with 3 fields"):
        decode({"named": f"{__name__}:Pair", "values": [1, 2, 3]}, {})


@pytest.mark.parametrize(
    "skeleton", [{}, [1], {"tensor": "x", "learned": False}, {"mapping": "set", "pairs": []}, {"float": "1e5"}]
)
def test_a_skeleton_that_is_none(skeleton: Any) -> None:
    with pytest.raises(fm.DataError, match="describes nothing that a run is made of"):
        decode(skeleton, {})


@pytest.mark.parametrize("metadata", [None, {"funcmeta": "1"}, {"funcmeta": "{}"}, {"funcmeta": "[" * 10_000}])
def test_a_foreign_file(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(safetensors.torch.save({"w": torch.ones(2)}, metadata))
    with pytest.raises(fm.DataError, match="is a safetensors file, but none of a run of funcmeta"):
        load(tmp_path / "x")


@pytest.mark.parametrize(
    "skeleton",
    [
        {"mapping": "dict", "pairs": [[[], 1]]},
        {"mapping": "dict", "pairs": [1]},
        {"mapping": "dict", "pairs": [[1, 2, 3]]},
        {"mapping": "counter", "pairs": [[{}, 1]]},
        {"tensor": "w", "learned": True},
    ],
    ids=str,
)
def test_a_skeleton_that_was_signed_but_makes_no_tree(skeleton: Any, tmp_path: Path) -> None:
    tensors = {"w": torch.ones(2, dtype=torch.int64)}
    about = {"version": 1, "kind": "meta", "tree": skeleton, "sha256": _tree_file._checksum(skeleton, tensors)}
    (tmp_path / "x").write_bytes(safetensors.torch.save(tensors, {"funcmeta": json.dumps(about)}))
    with pytest.raises(fm.DataError, match=r"x is damaged: .* Pass a file that funcmeta.training wrote"):
        load(tmp_path / "x")


def test_nothing_is_imported_to_find_a_namedtuple(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module whose attributes are code, as those are that import lazily, is asked for none."""
    lazy = ModuleType("lazy")
    lazy.__getattr__ = pytest.fail  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "lazy", lazy)
    with pytest.raises(fm.DataError, match="needs the NamedTuple lazy:Pair"):
        decode({"named": "lazy:Pair", "values": []}, {})


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "x")
    with pytest.raises(fm.DataError, match="cannot be read as safetensors"):
        load(tmp_path / "x")
    with pytest.raises(fm.DataError, match=r"is a folder\. Pass a file that funcmeta.training wrote"):
        load(tmp_path)


def test_a_full_disk(tmp_path: Path) -> None:
    save({"w": torch.zeros(10)}, tmp_path / "meta")
    before = (tmp_path / "meta").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(fm.SaveError, match=r"meta could not be written: File too large\. .*whole: make room"):
            save({"w": torch.zeros(100_000)}, tmp_path / "meta")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "meta").read_bytes() == before
    assert os.listdir(tmp_path) == ["meta"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of 100 kB; only root can have one."""
    command = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(tmp_path)]
    if os.getuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system of its own can be mounted here")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_file_system_without_room_or_without_leave_to_write(small_disk: Path) -> None:
    save({"w": torch.zeros(10)}, small_disk / "meta")
    before = (small_disk / "meta").read_bytes()
    with pytest.raises(fm.SaveError, match="No space left on device"):
        save({"w": torch.zeros(100_000)}, small_disk / "meta")
    assert (small_disk / "meta").read_bytes() == before
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(fm.SaveError, match="Read-only file system"):
        save({"w": torch.zeros(10)}, small_disk / "meta")
