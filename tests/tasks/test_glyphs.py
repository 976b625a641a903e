"""The embedded glyphs: what they hold, how they vary, and how fast."""

import json
import lzma
import runpy
import statistics
import time
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import funcmeta.tasks as tasks
from funcmeta._errors import DataError
from funcmeta.tasks._warp import NUMBERS, REACH, edge_distance, warp
from funcmeta.tasks.glyphs import DATA, SPLITS, read

FONTS = Path("/usr/share/fonts/truetype/noto")


@pytest.fixture(scope="module")
def splits() -> dict[str, tuple[tuple[tuple[str, str], ...], Tensor]]:
    return {split: read(DATA, split) for split in SPLITS}


def test_there_are_5000_characters_of_100_scripts_in_300_kilobytes(splits) -> None:
    names = [name for split in splits.values() for name in split[0]]
    assert len(set(names)) == len(names) == sum(len(bitmaps) for _, bitmaps in splits.values()) == 6147
    assert len({script for script, _ in names}) == 142
    assert DATA.stat().st_size < 300_000
    assert max(sum(script == name for name, _ in names) for script in {"Yi", "Tangut", "Cuneiform", "Vai"}) <= 100
    assert "SIL OPEN FONT LICENSE" in (DATA.parent / "OFL.txt").read_text(encoding="utf-8")


def test_the_splits_share_no_script_and_no_bitmap(splits) -> None:
    scripts = {split: {script for script, _ in names} for split, (names, _) in splits.items()}
    assert {split: len(each) for split, each in scripts.items()} == {"train": 91, "validation": 23, "test": 28}
    assert not any(scripts[one] & scripts[other] for one, other in combinations(SPLITS, 2))
    bitmaps = torch.cat([each for _, each in splits.values()]).flatten(1)
    assert len(bitmaps.unique(dim=0)) == len(bitmaps)
    assert bitmaps.any(1).all()


def test_scripts_that_share_shapes_are_in_one_split(splits) -> None:
    where = {script: split for split, (names, _) in splits.items() for script, _ in names}
    families = [
        {"Latin", "Greek", "Cyrillic", "Coptic"},
        {"Thai", "Lao"},
        {"Bengali", "Tirhuta"},
        {"Kannada", "Telugu"},
    ]
    for family in families:
        assert len({where[script] for script in family}) == 1


def test_no_character_looks_like_another_one(splits) -> None:
    """In each pair more than a twentieth of the ink lies beyond one pixel of the other's."""
    bitmaps = torch.cat([each for _, each in splits.values()]).float()
    grown = F.max_pool2d(bitmaps[:, None], 3, 1, 1).flatten(1)
    bitmaps = bitmaps.flatten(1)
    ink = bitmaps.sum(1)
    beyond = ink[:, None] - bitmaps @ grown.T
    share = (beyond + beyond.T) / (ink[:, None] + ink)
    assert share.fill_diagonal_(1).min() > 0.05


def test_the_script_and_character_of_a_class_belong_together(splits) -> None:
    names = dict.fromkeys(name for split in splits.values() for name in split[0])
    for name in [("Greek", "Ψ"), ("Cherokee", "Ꭰ"), ("Devanagari", "क"), ("Thai", "ข"), ("Yi", "ꀀ")]:
        assert name in names


@pytest.mark.parametrize("queries", [15, 0])
def test_a_task_has_the_shapes_of_the_readme(queries: int) -> None:
    task = tasks.glyphs(ways=5, shots=2, queries=queries).sample(seed=0)
    images, labels = task.support
    assert images.shape == (10, 1, 28, 28)
    assert images.dtype == torch.float32
    assert labels.tolist() == [0, 1, 2, 3, 4] * 2
    assert labels.dtype == torch.int64
    assert images.min() == 0
    assert 0.9 < images.amax((1, 2, 3)).min() <= images.max() == 1
    assert 0.03 < images.mean() < 0.4
    assert len(set(task.spec)) == 5
    assert set(task.spec) <= set(tasks.glyphs().classes)
    if queries:
        assert task.query is not None
        assert task.query[0].shape == (75, 1, 28, 28)
        assert task.query[1].tolist() == [0, 1, 2, 3, 4] * 15
    else:
        assert task.query is None


def test_the_spec_names_the_classes_by_label() -> None:
    sampler = tasks.glyphs(ways=4, shots=1, queries=1, variation=0.0)
    batch = sampler.sample_batch(seed=5, tasks=3)
    names, bitmaps = read(DATA, "train")
    for task in range(3):
        index = [names.index(name) for name in batch.spec[task]]
        plain = warp(edge_distance(bitmaps[index]), torch.zeros(4, 1, NUMBERS), 28)
        assert torch.equal(batch.support[0][task], plain)


def test_without_variation_an_image_is_the_bitmap() -> None:
    task = tasks.glyphs(ways=20, shots=1, queries=2, variation=0.0).sample(seed=0)
    assert task.query is not None
    first, second = task.query[0].chunk(2)
    assert torch.equal(first, second)
    names, bitmaps = read(DATA, "train")
    expected = bitmaps[[names.index(name) for name in task.spec]].float()[:, None]
    expected = F.pad(F.interpolate(expected, size=(20, 20), mode="area"), (4,) * 4)
    images = task.support[0]
    assert F.cosine_similarity(images.flatten(1), expected.flatten(1)).min() > 0.85


def test_examples_of_a_class_differ_but_less_than_classes_do() -> None:
    """Nearest neighbours in pixels: neither chance (0.2) nor trivial; 0.417 on Omniglot in Vinyals et al. 2016."""
    batch = tasks.glyphs(split="test").sample_batch(seed=0, tasks=100)
    assert batch.query is not None
    nearest = torch.cdist(batch.query[0].flatten(2), batch.support[0].flatten(2)).argmin(-1)
    assert 0.38 < (nearest == batch.query[1]).float().mean() < 0.5


def number(index: int, value: float) -> Tensor:
    """The variation in which one number is not zero."""
    return F.one_hot(torch.tensor(index), NUMBERS).float()[None, None] * value


def moments(image: Tensor) -> tuple[Tensor, Tensor]:
    """Centre (right, down) in pixels from the middle, and covariance."""
    axes = [torch.arange(size) - (size - 1) / 2 for size in image.shape]
    down, right = torch.meshgrid(*axes, indexing="ij")
    points = torch.stack([right.flatten(), down.flatten()], 1)
    weights = image.flatten() / image.sum()
    centre = weights @ points
    return centre, torch.cov(points.T, aweights=weights, correction=0)


@pytest.fixture
def bar() -> Tensor:
    """A bar from left to right, 24 x 6 of 32 pixels."""
    ink = torch.zeros(1, 32, 32, dtype=torch.bool)
    ink[:, 13:19, 4:28] = True
    return edge_distance(ink)


def test_a_bar_keeps_its_place_and_size(bar: Tensor) -> None:
    image = warp(bar, torch.zeros(1, 1, NUMBERS), 64)[0, 0]
    centre, covariance = moments(image)
    pixel = 0.7 * 64 / 32
    assert centre.abs().max() < 1e-3
    torch.testing.assert_close(covariance.diag(), torch.tensor([24.0, 6.0]) ** 2 * pixel**2 / 12, rtol=0.05, atol=0)
    torch.testing.assert_close(image.sum().item(), 24 * 6 * pixel**2, rtol=0.03, atol=0)


@pytest.mark.parametrize("sign", [-1, 1])
def test_each_number_does_its_own_thing(bar: Tensor, sign: int) -> None:
    _, plain = moments(warp(bar, torch.zeros(1, 1, NUMBERS), 64)[0, 0])
    turned, scaled, stretched, sheared, right, down, bold = [warp(bar, number(k, sign), 64)[0, 0] for k in range(7)]
    _, covariance = moments(turned)
    angle = torch.atan2(2 * covariance[0, 1], covariance[0, 0] - covariance[1, 1]) / 2
    assert abs(angle + sign * 0.25) < 0.02
    _, covariance = moments(scaled)
    ratio = (covariance.diag() / plain.diag()).log() / 2
    torch.testing.assert_close(ratio, torch.full((2,), -sign * 0.15), rtol=0, atol=0.02)
    _, covariance = moments(stretched)
    ratio = (covariance.diag() / plain.diag()).log() / 2
    torch.testing.assert_close(ratio, torch.tensor([-sign * 0.12, sign * 0.12]), rtol=0, atol=0.02)
    _, covariance = moments(sheared)
    torch.testing.assert_close(covariance[0, 1], -sign * 0.25 * plain[1, 1], rtol=0.05, atol=0)
    for image, expected in ((right, (1, 0)), (down, (0, 1))):
        centre, _ = moments(image)
        torch.testing.assert_close(centre, -sign * 0.12 * 32 * torch.tensor(expected), rtol=0, atol=0.1)
    growth = 2 * {1: 1.2, -1: -0.4}[sign]
    area = (24 + growth) * (6 + growth) * (0.7 * 64 / 32) ** 2
    torch.testing.assert_close(bold.sum().item(), area, rtol=0.05, atol=0)


def test_the_elastic_field_moves_parts_apart_and_is_smooth(bar: Tensor) -> None:
    control = 7 + 2 * (2 * 5 + 1) + 1
    image = warp(bar, number(control, 1.0), 64)[0, 0]
    left, right = moments(image[:, :32])[0][1], moments(image[:, 32:])[0][1]
    assert left < right - 1
    assert (image.amax(0)[16:48] > 0.9).all()


def test_the_edge_distance_is_that_of_the_definition() -> None:
    ink = torch.rand(3, 9, 9, generator=torch.Generator().manual_seed(0)) < 0.3
    ink[2] = False
    distance = edge_distance(ink)
    assert distance.shape == (3, 9 + 2 * REACH, 9 + 2 * REACH)
    padded = F.pad(ink, (REACH,) * 4)
    points = torch.cartesian_prod(*[torch.arange(9 + 2 * REACH)] * 2).float()
    between = torch.cdist(points, points)
    for mask, got in zip(padded.flatten(1), distance.flatten(1), strict=True):
        to_ink = between.masked_fill(~mask, 99).amin(1)
        to_paper = between.masked_fill(mask, 99).amin(1)
        torch.testing.assert_close(got, torch.where(mask, to_paper - 0.5, 0.5 - to_ink).clamp(-REACH, REACH))


def pack(header: object, body: bytes) -> bytes:
    return lzma.compress(json.dumps(header).encode() + b"\n" + body)


GOOD = {"size": 4, "scripts": [["Small", "train", "ab"]]}


def test_a_small_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "glyphs.bin"
    path.write_bytes(pack(GOOD, b"\x80\x00\xff\xff"))
    names, bitmaps = read(path, "train")
    assert names == (("Small", "a"), ("Small", "b"))
    assert bitmaps.sum((1, 2)).tolist() == [1, 16]
    assert read(path, "test")[0] == ()


@pytest.mark.parametrize(
    "content",
    {
        "empty": b"",
        "truncated": DATA.read_bytes()[:-1],
        "half": DATA.read_bytes()[:100_000],
        "flipped": DATA.read_bytes()[:1000] + b"\0" + DATA.read_bytes()[1001:],
        "a pickle": b"\x80\x04\x95\x0b\x00\x00\x00.",
        "a packed pickle": lzma.compress(b"\x80\x04N."),
        "no header": lzma.compress(b"\0" * 100),
        "other header": pack({"width": 4}, b""),
        "a list": pack([4], b""),
        "rows of another kind": pack({"size": 4, "scripts": [["Small", "train"]]}, b""),
        "too few bitmaps": pack(GOOD, b"\x80\x00"),
        "too small bitmaps": pack(GOOD | {"size": 5}, b"\x80\x00\xff\xff"),
        "size of another kind": pack(GOOD | {"size": "4"}, b"\x80\x00\xff\xff"),
        "a bomb": lzma.compress(b" " * (1 << 25)),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_truncated_or_foreign_file_is_refused(content: tuple[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "glyphs.bin"
    path.write_bytes(content[1])
    with pytest.raises(DataError, match=r"glyphs.bin is missing, truncated or not a glyph file .* Install the package"):
        read(path, "train")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is missing, truncated or not a glyph file"):
        read(tmp_path / "nothing", "train")


@pytest.mark.slow
@pytest.mark.skipif(not FONTS.is_dir(), reason=f"the Noto fonts are not installed in {FONTS}")
def test_the_same_fonts_give_the_same_glyphs(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    pytest.importorskip("fontTools")
    script = runpy.run_path(str(DATA.parent / "render.py"))
    script["main"](FONTS, tmp_path / "glyphs.bin")
    assert (tmp_path / "glyphs.bin").read_bytes() == DATA.read_bytes()


@pytest.mark.timing
def test_32_tasks_take_less_than_150_milliseconds() -> None:
    sampler = tasks.glyphs(ways=5, shots=1, queries=15)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seconds = []
        for seed in range(11):
            start = time.perf_counter()
            sampler.sample_batch(seed, tasks=32)
            seconds.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    assert statistics.median(seconds) < 0.150


def test_numpy_is_left_alone() -> None:
    state = np.random.get_state()[1].tolist()
    tasks.glyphs().sample(seed=0)
    assert np.random.get_state()[1].tolist() == state
