"""Seeds: the same numbers give the same seed, other numbers an unrelated one, and no generator is left changed."""

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from funcmeta import rng
from funcmeta._errors import ArgumentError

SEEDS = st.integers(0, 2**63 - 1)
NUMBERS = st.lists(st.integers(-(2**70), 2**70), min_size=1, max_size=3)


@given(SEEDS, NUMBERS)
def test_fold_is_a_function_into_the_valid_seeds(seed: int, numbers: list[int]) -> None:
    assert rng.fold(seed, *numbers) == rng.fold(seed, *numbers)
    assert rng.check_seed(rng.fold(seed, *numbers)) == rng.fold(seed, *numbers)


FROZEN = [6017775124710473527, 313702574736366215, 3395948882924712079, 825034979826561905]


def test_fold_starts_as_splitmix64_does() -> None:
    """The first output of splitmix64 from state 0 is e220a8397b1dcdaf in Vigna's reference implementation."""
    assert rng.fold(0) == 0xE220A8397B1DCDAF >> 1


def test_the_values_are_frozen() -> None:
    """A task of a published result must stay the task it was."""
    assert [rng.fold(0, 0), rng.fold(0, 1), rng.fold(1, 0), rng.fold(7, 1, 2)] == FROZEN


def test_neighbouring_seeds_and_steps_never_meet() -> None:
    seeds = {rng.fold(seed, step) for seed in range(200) for step in range(200)}
    assert len(seeds) == 200 * 200


def test_the_order_and_the_number_of_uses_matter() -> None:
    assert rng.fold(0, 1, 2) != rng.fold(0, 2, 1)
    assert rng.fold(0, 1) != rng.fold(0, 1, 0)


def test_each_bit_of_the_step_flips_about_half_of_the_seed() -> None:
    flips = [(rng.fold(7, 5) ^ rng.fold(7, 5 ^ 1 << bit)).bit_count() for bit in range(64)]
    assert all(16 <= each <= 48 for each in flips)
    assert 29 < sum(flips) / 64 < 34


@pytest.mark.parametrize("seed", [-1, 2**63, 1.0, True, None, "3", torch.tensor(3)], ids=str)
@pytest.mark.parametrize(
    "function", [rng.check_seed, rng.fold, rng.generator, lambda seed: rng.forked(seed).__enter__()], ids=range(4)
)
def test_a_wrong_seed_is_refused(function: Any, seed: Any) -> None:
    message = f"seed is {seed!r}, expected an integer from 0 to 2**63 - 1. Pass a non-negative int."
    with pytest.raises(ArgumentError, match=re.escape(message)):
        function(seed)


def test_generators_are_fresh_and_apart_from_the_global_one() -> None:
    before = torch.get_rng_state()
    first, second = (torch.rand(3, generator=rng.generator(5)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, torch.rand(3, generator=rng.generator(6)))
    assert torch.equal(torch.get_rng_state(), before)


def test_forked_seeds_the_block_and_puts_the_state_back() -> None:
    torch.manual_seed(1)
    expected = torch.rand(4)
    torch.manual_seed(1)
    with rng.forked(9):
        inside = torch.rand(4)
    assert torch.equal(torch.rand(4), expected)
    with rng.forked(9):
        assert torch.equal(torch.rand(4), inside)


def test_forked_puts_the_state_back_after_an_error() -> None:
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="size"), rng.forked(9):
        torch.rand(2) @ torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)


def test_forked_blocks_nest() -> None:
    with rng.forked(1):
        expected = torch.rand(2)
    with rng.forked(1):
        with rng.forked(2):
            torch.rand(2)
        assert torch.equal(torch.rand(2), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_forked_seeds_the_current_cuda_device_too() -> None:
    before = torch.cuda.get_rng_state()
    with rng.forked(9):
        inside = torch.rand(4, device="cuda")
    assert torch.equal(torch.cuda.get_rng_state(), before)
    with rng.forked(9):
        assert torch.equal(torch.rand(4, device="cuda"), inside)


def test_returned_to_draws_again_what_was_drawn_after_the_states() -> None:
    torch.rand(3)
    states = rng.states()
    expected = torch.rand(4), torch.randn(2)
    now = torch.get_rng_state()
    for _ in range(2):
        with rng.returned_to(states):
            assert torch.equal(torch.rand(4), expected[0])
            assert torch.equal(torch.randn(2), expected[1])
        assert torch.equal(torch.get_rng_state(), now)


def test_states_are_copies() -> None:
    states = rng.states()
    kept = [each.clone() for each in states]
    torch.rand(3)
    assert all(torch.equal(*pair) for pair in zip(states, kept, strict=True))


def test_returned_to_puts_the_state_back_after_an_error() -> None:
    states = rng.states()
    torch.rand(1)
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="size"), rng.returned_to(states):
        torch.rand(2) @ torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
