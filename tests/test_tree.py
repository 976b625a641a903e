"""Trees: what goes in comes out, whatever the nesting and whatever the order in which the keys were inserted."""

import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from funcmeta import tree
from funcmeta._errors import FuncmetaError, StructureError


class Pair(NamedTuple):
    left: Any
    right: Any


def tensors(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


LEAVES = st.lists(st.integers(0, 3), max_size=2).map(lambda shape: tensors(tuple(shape)))
KEYS = st.sampled_from(["0.weight", "0.bias", "scale", "a b", "'"])


def containers(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.dictionaries(KEYS, children, max_size=3),
        st.lists(children, max_size=3),
        st.tuples(children, children),
        st.builds(Pair, children, children),
    )


TREES = st.recursive(LEAVES, containers, max_leaves=8)
FLAT = st.dictionaries(KEYS, LEAVES, max_size=4)


def reordered(value: Any) -> Any:
    """The same tree, with the keys of every dict inserted in the opposite order."""
    match value:
        case dict():
            return {key: reordered(value[key]) for key in reversed(value)}
        case Pair():
            return Pair(*[reordered(each) for each in value])
        case list() | tuple():
            return type(value)([reordered(each) for each in value])
    return value


def same(left: Any, right: Any) -> bool:
    """Whether two trees are equal to the bit; dicts are compared as Python compares them."""
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))


@given(TREES)
def test_unflatten_inverts_flatten(value: Any) -> None:
    leaves, spec = tree.flatten(value)
    assert same(tree.unflatten(leaves, spec), value)
    assert all(a is b for a, b in zip(tree.leaves(value), leaves, strict=True))


@given(TREES)
def test_named_leaves_are_expressions_that_reach_the_leaf(value: Any) -> None:
    for name, leaf in tree.named_leaves(value, "meta"):
        assert eval(name, {"meta": value}) is leaf


def test_named_leaves_of_a_nested_tree() -> None:
    value = {"params": {"0.weight": torch.ones(1)}, "rest": [torch.ones(1), Pair(torch.ones(1), None)]}
    assert [name for name, _ in tree.named_leaves(value, "meta")] == [
        "meta['params']['0.weight']",
        "meta['rest'][0]",
        "meta['rest'][1].left",
        "meta['rest'][1].right",
    ]
    assert tree.named_leaves(torch.ones(1), "x")[0][0] == "x"


@given(st.one_of(TREES, FLAT))
def test_map_applies_to_each_leaf_and_keeps_the_structure(value: Any) -> None:
    assert same(tree.map(lambda leaf: leaf, value), value)
    doubled = tree.map(lambda leaf: leaf * 2, value)
    assert tree.flatten(doubled)[1] == tree.flatten(value)[1]
    assert all(torch.equal(a, b * 2) for a, b in zip(tree.leaves(doubled), tree.leaves(value), strict=True))


@given(st.one_of(TREES, FLAT))
def test_map_pairs_leaves_by_key_and_not_by_order(value: Any) -> None:
    assert all(leaf is True for leaf in tree.leaves(tree.map(lambda a, b: a is b, value, reordered(value))))


@given(FLAT)
def test_map_does_not_touch_its_arguments(value: dict[str, Tensor]) -> None:
    before = {key: leaf.clone() for key, leaf in value.items()}
    tree.map(lambda a, b: a + b, value, value)
    assert same(value, before)


def test_map_of_three_trees() -> None:
    value = [torch.tensor(1.0), {"a": torch.tensor(2.0)}]
    summed = tree.map(lambda a, b, c: a + b * c, value, value, value)
    assert [float(each) for each in tree.leaves(summed)] == [2.0, 6.0]


def test_map_of_a_flat_dict_with_a_dict_of_other_leaves() -> None:
    got = tree.map(lambda leaf, rate: (leaf, rate), {"a": torch.ones(1), "b": torch.ones(1)}, {"b": 2.0, "a": 1.0})
    assert (got["a"][1], got["b"][1]) == (1.0, 2.0)


@given(TREES)
def test_aligned_gives_the_expected_order(value: Any) -> None:
    got = tree.aligned(value, reordered(value))
    assert all(a is b for a, b in zip(got, tree.leaves(value), strict=True))


OTHER_KEYS: dict[str, tuple[Any, Any, str]] = {
    "missing": ({"a": 1, "b": 2}, {"a": 1}, "tree has other keys than expected: missing tree['b'], unexpected nothing"),
    "unexpected": ({"a": 1}, {"a": 1, "b": 2}, "missing nothing, unexpected tree['b']. Pass a tree with exactly the"),
    "nested": ({"a": [1, 2]}, {"a": [1]}, "missing tree['a'][1], unexpected nothing"),
    "kind": ({"a": 1}, [1], "missing tree['a'], unexpected tree[0]"),
    "many": (dict.fromkeys("abcdefg", 1), {}, "tree['e'] and 2 more, unexpected nothing"),
}


@pytest.mark.parametrize(("expected", "got", "message"), OTHER_KEYS.values(), ids=OTHER_KEYS.keys())
@pytest.mark.parametrize(
    "function",
    [tree.aligned, tree.check_same, lambda expected, got: tree.map(lambda a, b: a, expected, got)],
    ids=["aligned", "check_same", "map"],
)
def test_other_keys_are_refused(function: Callable[[Any, Any], Any], expected: Any, got: Any, message: str) -> None:
    with pytest.raises(StructureError, match=re.escape(message)):
        function(expected, got)


def test_a_missing_parameter_is_refused_by_map_of_flat_dicts() -> None:
    with pytest.raises(StructureError, match=re.escape("missing tree['b']")):
        tree.map(torch.add, {"a": torch.ones(1), "b": torch.ones(1)}, {"a": torch.ones(1)})


@given(TREES)
def test_check_same_accepts_the_same_shapes(value: Any) -> None:
    tree.check_same(value, reordered(value))


DIFFERENT: dict[str, tuple[Any, Any, str]] = {
    "shape": (torch.ones(3, 4), torch.ones(4), "state['a'] is float32[4] on cpu, expected float32[3, 4] on cpu."),
    "dtype": (torch.ones(1), torch.ones(1).double(), "state['a'] is float64[1] on cpu, expected float32[1] on cpu."),
    "device": (torch.ones(1), torch.ones(1, device="meta"), "is float32[1] on meta, expected float32[1] on cpu."),
    "number": (torch.ones(1), 1.0, "state['a'] is 1.0 (float), expected float32[1] on cpu."),
    "type": (1, 1.0, "state['a'] is 1.0 (float), expected 1 (int)."),
}


@pytest.mark.parametrize(("expected", "got", "message"), DIFFERENT.values(), ids=DIFFERENT.keys())
def test_check_same_names_the_leaf_that_differs(expected: Any, got: Any, message: str) -> None:
    with pytest.raises(StructureError, match=re.escape(message) + " Keep the dtype.$"):
        tree.check_same({"z": 0, "a": expected}, {"a": got, "z": 1}, name="state", advice="Keep the dtype.")


def test_check_same_without_advice_ends_with_the_fact() -> None:
    with pytest.raises(StructureError, match=re.escape("expected 1 (int).") + "$"):
        tree.check_same(1, 1.0)


def test_detach_cuts_tensors_and_leaves_the_rest() -> None:
    leaf = torch.ones(2, requires_grad=True)
    cut = tree.detach({"a": leaf * 2, "b": [leaf, None, 3]})
    assert not any(each.requires_grad for each in (cut["a"], cut["b"][0]))
    assert torch.equal(cut["a"], torch.full((2,), 2.0))
    assert cut["b"][1:] == [None, 3]
    assert leaf.requires_grad


def test_check_tensors() -> None:
    tree.check_tensors({"a": torch.ones(1), "b": [torch.ones(1)]}, name="meta")
    message = "meta['lr'] is 0.1 (float), expected a tensor. Wrap numbers in torch.tensor(...)."
    with pytest.raises(StructureError, match=re.escape(message)):
        tree.check_tensors({"a": torch.ones(1), "lr": 0.1}, name="meta")


def test_structure_errors_can_be_caught_as_ours_or_as_python_ones() -> None:
    assert issubclass(StructureError, FuncmetaError)
    assert issubclass(StructureError, ValueError)


@given(TREES)
def test_dot_and_norm_are_those_of_the_concatenated_leaves(value: Any) -> None:
    vector = torch.cat([leaf.reshape(-1) for leaf in tree.leaves(value)] or [torch.zeros(0, dtype=torch.float64)])
    torch.testing.assert_close(tree.dot(value, value).double(), vector @ vector)
    torch.testing.assert_close(tree.norm(value).double(), vector.norm())


def test_dot_pairs_different_trees() -> None:
    left = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)}
    right = {"a": torch.tensor([4.0, 5.0]), "b": torch.tensor(-6.0)}
    assert float(tree.dot(left, right)) == 1 * 4 + 2 * 5 - 3 * 6


def test_dot_pairs_leaves_by_key_and_not_by_order() -> None:
    value = {"a": torch.tensor(2.0), "b": torch.tensor(3.0)}
    assert float(tree.dot(value, reordered(value))) == 2 * 2 + 3 * 3


def test_dot_and_norm_are_differentiable() -> None:
    value = {"a": torch.tensor([3.0, 4.0], dtype=torch.float64, requires_grad=True)}
    (gradient,) = torch.autograd.grad(tree.norm(value), value["a"])
    torch.testing.assert_close(gradient, torch.tensor([0.6, 0.8], dtype=torch.float64))


def test_parameters_are_compared_like_tensors() -> None:
    with pytest.raises(StructureError, match="expected float32"):
        tree.check_same(torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3)))


def test_a_hollow_tree_is_filled_again() -> None:
    value = {"a": torch.ones(2), "name": "run", "rest": [None, Pair(torch.zeros(1), 3)]}
    hollow = tree.hollow(value)
    assert tree.tensors(hollow) == []
    filled = tree.filled(hollow, tree.tensors(value))
    assert filled["name"] == "run"
    assert filled["rest"][0] is None
    assert filled["rest"][1].__class__ is Pair
    assert all(one is other for one, other in zip(tree.leaves(filled), tree.leaves(value), strict=True))


def test_what_torch_opens_comes_apart() -> None:
    parts, rest = tree.opened(OrderedDict(a=1, b=2)) or ([], None)
    assert (list(parts), list(rest)) == ([1, 2], ["a", "b"])
    assert tree.opened(frozenset({1})) is None
