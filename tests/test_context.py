"""Autocast that is remembered: the same later as it was then."""

import pytest
import torch

from funcmeta._context import Autocast

X = torch.randn(3, 3)


def product() -> torch.dtype:
    return (X @ X).dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_is_remembered(dtype: torch.dtype) -> None:
    with torch.autocast("cpu", dtype):
        then = Autocast([X])
    assert product() == torch.float32
    with then.again():
        assert product() == dtype
    assert product() == torch.float32


def test_off_is_remembered() -> None:
    then = Autocast([X])
    with torch.autocast("cpu", torch.bfloat16):
        with then.again():
            assert product() == torch.float32
        assert product() == torch.bfloat16


def test_keys_are_equal_for_equal_settings() -> None:
    off, nothing = Autocast([X]), Autocast([])
    with torch.autocast("cpu", torch.bfloat16):
        on, again = Autocast([X]), Autocast([X, X])
    with torch.autocast("cpu", torch.float16):
        other = Autocast([X])
    assert on.key == again.key != other.key
    assert off.key == nothing.key == ()
    assert len({on.key, other.key, off.key}) == 3


def test_without_tensors_nothing_is_changed() -> None:
    then = Autocast([])
    with torch.autocast("cpu", torch.bfloat16), then.again():
        assert product() == torch.bfloat16


def test_it_is_left_after_an_error() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        then = Autocast([X])
    with pytest.raises(RuntimeError, match="shapes"), then.again():
        X @ torch.randn(2, 2)
    assert not torch.is_autocast_enabled("cpu")
