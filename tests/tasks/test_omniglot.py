"""Omniglot: the published archives where they are at hand, and small ones of our own making everywhere."""

import io
import random
import struct
import sys
import tracemalloc
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from real_data import OMNIGLOT, needs
from torch import Tensor

import funcmeta.tasks as tasks
from funcmeta import rng
from funcmeta._errors import ArgumentError, DataError, MissingExtraError
from funcmeta.tasks._archive import LARGEST_FILE, MOST_MEMBERS
from funcmeta.tasks._drawings import average_areas

published = needs(OMNIGLOT / "images_background_small1.zip")


def png(ink: np.ndarray, mode: str = "1") -> bytes:
    """The file of a black on white drawing."""
    stream = io.BytesIO()
    Image.fromarray(np.where(ink, 0, 255).astype(np.uint8)).convert(mode).save(stream, "PNG")
    return stream.getvalue()


def drawing(*number: int) -> np.ndarray:
    """A blot in the upper left that only these numbers have."""
    ink = np.zeros((105, 105), bool)
    generator = np.random.default_rng(number)
    ink[5:45, 5:45] = generator.random((40, 40)) < 0.5
    return ink


def background(alphabets: dict[str, int], drawers: int = 4, top: str = "images_background") -> dict[str, bytes]:
    """An archive with so many characters of each alphabet."""
    return {
        f"{top}/{alphabet}/character{character:02}/{character:04}_{drawer:02}.png": png(
            drawing(len(alphabet), character, drawer)
        )
        for alphabet, characters in alphabets.items()
        for character in range(1, characters + 1)
        for drawer in range(1, drawers + 1)
    }


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def one_run(run: str = "run01") -> dict[str, bytes]:
    """A run of three characters, whose test images are the training images in another order."""
    files = {f"{run}/training/class{each:02}.png": png(drawing(each)) for each in (1, 2, 3)}
    files |= {f"{run}/test/item{item:02}.png": png(drawing(each)) for item, each in ((1, 2), (2, 3), (3, 1))}
    pairs = [(1, 2), (2, 3), (3, 1)]
    lines = [f"{run}/test/item{item:02}.png {run}/training/class{each:02}.png" for item, each in pairs]
    return files | {f"{run}/class_labels.txt": ("\n".join(lines) + "\n").encode()}


SMALL = {"Latin": 2, "Greek": 3, "Hebrew": 1, "Tagalog": 2, "Angelic": 1}


def test_zips_and_folders_give_the_same_tasks(tmp_path: Path) -> None:
    files = background(SMALL)
    for folder in ("zips", "mixed"):
        (tmp_path / folder).mkdir()
    sources = [
        write_zip(tmp_path / "images_background.zip", files),
        write_folder(tmp_path / "unpacked", files),
        tmp_path / "unpacked" / "images_background",
        write_zip(tmp_path / "zips" / "images_background.zip", files).parent,
    ]
    write_zip(tmp_path / "mixed" / "images_background_small1.zip", dict(list(files.items())[:20]))
    write_folder(tmp_path / "mixed", dict(list(files.items())[8:]))
    first, *others = [
        tasks.omniglot(source, ways=3, shots=1, queries=2).sample(seed=1) for source in [*sources, tmp_path / "mixed"]
    ]
    for other in others:
        assert other.spec == first.spec
        assert torch.equal(other.support[0], first.support[0])
        assert other.query is not None
        assert first.query is not None
        assert torch.equal(other.query[0], first.query[0])


def test_of_what_stands_in_two_archives_the_first_counts(tmp_path: Path) -> None:
    first = background({"Latin": 2})
    for name, files in (("images_a", first), ("images_b", {each: png(drawing(9)) for each in first})):
        write_zip(tmp_path / f"{name}.zip", files)
    sampler = tasks.omniglot(tmp_path, ways=2, shots=1, queries=3)
    assert sampler.classes == (("Latin", "character01"), ("Latin", "character02"))
    alone = tasks.omniglot(tmp_path / "images_a.zip", ways=2, shots=1, queries=3)
    assert torch.equal(sampler.sample(seed=0).support[0], alone.sample(seed=0).support[0])
    with pytest.raises(ArgumentError, match=r"shots \+ queries is 5, expected at most 4, the number of examples"):
        tasks.omniglot(tmp_path, ways=2, shots=1, queries=4)


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    files = background({"Latin": 1})
    foreign = {
        "__MACOSX/images_background/Latin/character01/._0001_01.png": b"fork",
        "images_background/Latin/character01/notes.txt": b"notes",
        "images_background/Latin/drawing/0001_01.png": b"",
    }
    path = write_zip(tmp_path / "images_background.zip", files | foreign)
    assert len(tasks.omniglot(path, ways=1, queries=1).classes) == 1
    assert [each.name for each in tmp_path.iterdir()] == ["images_background.zip"]


@pytest.mark.parametrize(
    ("split", "alphabets"),
    [
        ("train", {"Greek", "Latin"}),
        ("validation", {"Hebrew"}),
        ("test", {"Tagalog", "Angelic"}),
        ("background", {"Greek", "Latin", "Hebrew", "Tagalog"}),
        ("evaluation", {"Angelic"}),
    ],
)
def test_an_alphabet_has_one_split_of_ours_and_one_of_the_published(
    split: str, alphabets: set[str], tmp_path: Path
) -> None:
    path = write_zip(tmp_path / "images_background.zip", background(SMALL))
    sampler = tasks.omniglot(path, ways=1, queries=1, split=split)
    assert {alphabet for alphabet, _ in sampler.classes} == alphabets


def test_ink_is_one_and_the_place_is_kept(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "images_background.zip", background({"Latin": 1}))
    task = tasks.omniglot(path, ways=1, shots=4, queries=0, size=105).sample(seed=0)
    expected = {drawing(5, 1, drawer).tobytes() for drawer in range(1, 5)}
    assert {image[0].bool().numpy().tobytes() for image in task.support[0]} == expected
    assert task.query is None


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "P"])
def test_each_kind_of_png_is_read(mode: str, tmp_path: Path) -> None:
    name = "images_background/Latin/character01/0001_01.png"
    path = write_zip(tmp_path / "images_background.zip", {name: png(drawing(1), mode)})
    image = tasks.omniglot(path, ways=1, queries=0, size=105).sample(seed=0).support[0]
    assert torch.equal(image[0, 0].bool(), torch.from_numpy(drawing(1)))


def test_no_drawing_is_both_in_support_and_query(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "images_background.zip", background({"Latin": 3}))
    batch = tasks.omniglot(path, ways=3, shots=2, queries=2).sample_batch(seed=0, tasks=20)
    assert batch.query is not None
    images = torch.cat([batch.support[0], batch.query[0]], 1).flatten(2)
    assert all(len(task.unique(dim=0)) == 12 for task in images)
    assert batch.support[1].tolist() == [[0, 1, 2] * 2] * 20


@pytest.mark.parametrize("rotations", [False, True])
def test_task_i_of_a_batch_is_the_task_of_the_folded_seed(rotations: bool, tmp_path: Path) -> None:
    path = write_zip(tmp_path / "images_background.zip", background({"Latin": 3}))
    sampler = tasks.omniglot(path, ways=3, shots=1, queries=2, rotations=rotations, dtype=torch.float64)
    before = torch.get_rng_state()
    batch = sampler.sample_batch(seed=2, tasks=6)
    assert torch.equal(torch.get_rng_state(), before)
    stacked = tasks.stack([sampler.sample(rng.fold(2, index)) for index in range(6)])
    assert batch.spec == stacked.spec
    assert all(torch.equal(one, other) for one, other in zip(batch.support, stacked.support, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(batch.query, stacked.query, strict=True))
    assert batch.support[0].dtype == torch.float64


def test_turned_characters_are_classes_of_their_own(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "images_background.zip", background({"Latin": 2}, drawers=1))
    task = tasks.omniglot(path, ways=8, shots=1, queries=0, size=105, rotations=True).sample(seed=0)
    assert len(set(task.spec)) == 8
    for (_, name), image in zip(task.spec, task.support[0], strict=True):
        character, _, degrees = name.partition(" turned by ")
        upright = torch.from_numpy(drawing(5, int(character[-2:]), 1)).float()
        assert torch.equal(image[0], torch.rot90(upright, int(degrees or 0) // 90))


@pytest.mark.parametrize("size", [1, 21, 28, 35, 105, 150])
def test_areas_are_averaged(size: int) -> None:
    ink = torch.from_numpy(np.stack([drawing(1), drawing(2).T]))
    image = average_areas(ink, size, torch.float64)
    assert image.shape == (2, size, size)
    torch.testing.assert_close(image.mean((1, 2)), ink.double().mean((1, 2)), rtol=1e-12, atol=0)
    fine = ink.double().repeat_interleave(size, 1).repeat_interleave(size, 2) if size < 40 else None
    if fine is not None:
        torch.testing.assert_close(image, F.avg_pool2d(fine[:, None], 105)[:, 0], rtol=1e-10, atol=1e-12)


def test_a_run_is_a_task(tmp_path: Path) -> None:
    files = one_run("run01") | one_run("run02")
    sources = [write_zip(tmp_path / "all_runs.zip", files), tmp_path, write_folder(tmp_path / "all_runs", files)]
    for source in sources:
        runs = tasks.omniglot_runs(source, size=105, dtype=torch.float64)
        assert [run.spec for run in runs] == ["run01", "run02"]
        for run in runs:
            assert run.query is not None
            assert run.support[0].shape == (3, 1, 105, 105)
            assert run.support[0].dtype == torch.float64
            assert run.support[1].tolist() == [0, 1, 2]
            assert run.query[1].tolist() == [1, 2, 0]
            assert torch.equal(run.query[0], run.support[0][run.query[1]])


@pytest.mark.parametrize(
    "change",
    {
        "no labels": {"run01/class_labels.txt": None},
        "empty line": {"run01/class_labels.txt": b"run01/test/item01.png\n"},
        "no text": {"run01/class_labels.txt": b"\xff\xfe"},
        "unknown class": {"run01/training/class02.png": None},
        "unknown item": {"run01/test/item02.png": None},
        "other run": {"run01/class_labels.txt": b"run02/test/item01.png run01/training/class01.png\n"},
    }.items(),
    ids=lambda item: item[0],
)
def test_a_run_with_wrong_labels_is_refused(change: tuple[str, dict[str, bytes | None]], tmp_path: Path) -> None:
    files = {name: content for name, content in (one_run() | change[1]).items() if content is not None}
    path = write_zip(tmp_path / "all_runs.zip", files)
    with pytest.raises(DataError, match=r"run01/class_labels.txt is missing or names an image that is not. Download"):
        tasks.omniglot_runs(path)


def header(width: int, height: int) -> bytes:
    """A PNG that claims to be of this size."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0" * 100)
    parts = [struct.pack(">I", len(each) - 4) + each + struct.pack(">I", zlib.crc32(each)) for each in (chunk, data)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(100_000, 100_000), r"0001_01.png is an image of \(100000, 100000\) pixels, expected \(105, 105\). Rem"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "0001_01.png is truncated or not a PNG"),
        (header(2000, 1000), r"0001_01.png is an image of \(2000, 1000\) pixels, expected \(105, 105\). Remove"),
        (header(105, 105), "0001_01.png is truncated or not a PNG .* Download it again"),
        (png(drawing(1))[:-40], "0001_01.png is truncated or not a PNG"),
        (b"GIF89a", "Latin/character01/0001_01.png is truncated or not a PNG"),
        (b"", "is truncated or not a PNG"),
        (
            b"\0" * (LARGEST_FILE + 1),
            f"holds Latin/character01/0001_01.png of {LARGEST_FILE + 1} bytes, expected at most",
        ),
    ],
    ids=["absurd", "no size", "large", "no pixels", "truncated", "foreign", "empty", "long"],
)
def test_an_odd_image_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    files = {"images_background/Latin/character01/0001_01.png": content}
    for source in (write_zip(tmp_path / "images_background.zip", files), write_folder(tmp_path / "folder", files)):
        with pytest.raises(DataError, match=message):
            tasks.omniglot(source, ways=1)


def test_a_zip_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_zip(tmp_path / "images_background.zip", background({"Latin": 3}))
    monkeypatch.setattr(sys.modules["funcmeta.tasks._archive"], "LARGEST_SUM", 1000)
    with pytest.raises(DataError, match=r"bytes, expected at most 65536 a file and 1000 in all. Download"):
        tasks.omniglot(path, ways=1)


def claim(path: Path, size: int) -> None:
    """Let the only member of a zip claim to unpack to so many bytes, in both of its headers."""
    content = bytearray(path.read_bytes())
    for start, place in ((content.index(b"PK\3\4"), 22), (content.index(b"PK\1\2"), 24)):
        content[start + place : start + place + 4] = struct.pack("<I", size)
    path.write_bytes(content)


NAME = "images_background/Latin/character01/0001_01.png"


def test_a_member_is_unpacked_no_further_than_it_claims(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "images_background.zip", {NAME: b"\0" * 300_000_000})
    assert path.stat().st_size < 300_000
    claim(path, 600)
    tracemalloc.start()
    with pytest.raises(DataError, match=r"is truncated or not a zip \(Bad CRC-32 for file .*\)\. Download"):
        tasks.omniglot(path, ways=1)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()
    write_zip(path, {NAME: b"\0" * 500})
    claim(path, 600)
    with pytest.raises(DataError, match=r"0001_01.png has 500 bytes, expected the 600 that it claims"):
        tasks.omniglot(path, ways=1)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_member_that_can_not_be_unpacked_in_parts_is_refused(method: int, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "images_background.zip", "w", method) as archive:
        archive.writestr(NAME, png(drawing(1)))
    with pytest.raises(DataError, match=f"is compressed by method {method}, expected to be deflated"):
        tasks.omniglot(tmp_path, ways=1)


def test_a_zip_that_is_large_or_has_many_members_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_zip(tmp_path / "images_background.zip", {f"{each:x}": b"" for each in range(MOST_MEMBERS + 1)})
    with pytest.raises(DataError, match=r"holds 65537 members, expected at most 65536\. Unpack it"):
        tasks.omniglot(path, ways=1)
    monkeypatch.setattr(sys.modules["funcmeta.tasks._archive"], "LARGEST_ARCHIVE", 1000)
    with pytest.raises(DataError, match=r"has \d+ bytes, expected at most 1000 of a zip\. Unpack it"):
        tasks.omniglot(path, ways=1)


@pytest.mark.parametrize(
    "outside",
    [
        "../../Greek/character01/0001_01.png",
        "/tmp/Greek/character01/0001_01.png",
        "a\\..\\..\\x.png",
        "C:\\x.png",
        "a/..",
    ],
)
def test_a_member_that_leads_out_of_the_zip_is_refused(outside: str, tmp_path: Path) -> None:
    """Whether or not the member is one that would be read; and nothing is written."""
    (tmp_path / "data").mkdir()
    path = write_zip(tmp_path / "data" / "images_background.zip", {**background({"Latin": 2}), outside: b"x"})
    with pytest.raises(DataError, match=r"has a member .* whose path leads out of the zip\. .* get it anew"):
        tasks.omniglot(path, ways=1, queries=0)
    assert [each.name for each in tmp_path.rglob("*")] == ["data", "images_background.zip"]


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    torch.save({"images": torch.ones(2)}, tmp_path / "images_background.zip")  # a zip, too
    with pytest.raises(DataError, match=r"holds no file like .* Download"):
        tasks.omniglot(tmp_path, ways=1)


def test_characters_with_missing_drawings_are_refused(tmp_path: Path) -> None:
    files = background({"Latin": 3})
    del files["images_background/Latin/character02/0002_03.png"]
    path = write_zip(tmp_path / "images_background.zip", files)
    message = (
        "Latin/character02 has 3 drawings, but Latin/character01 has 4, expected the same number of each. Download"
    )
    with pytest.raises(DataError, match=message):
        tasks.omniglot(path, ways=1)


@pytest.mark.parametrize("load", [tasks.omniglot, tasks.omniglot_runs])
def test_a_path_to_nothing_of_the_kind_is_refused(load: Callable[..., object], tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"nothing does not exist, expected a zip or a folder. Download the archives from"
    ):
        load(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"holds no file like .* Download the archives from"):
        load(tmp_path)
    with pytest.raises(ArgumentError, match=r"path is None, expected the path of a zip or folder. Pass a str"):
        load(None)
    with pytest.raises(ArgumentError, match="size is -1, expected a positive integer"):
        load(tmp_path, size=-1)
    with pytest.raises(ArgumentError, match=r"dtype is torch.bool, expected a floating-point dtype"):
        load(tmp_path, dtype=torch.bool)


def test_an_unknown_or_empty_split_is_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "images_background.zip", background({"Latin": 1}))
    with pytest.raises(ArgumentError, match="split is 'all', expected one of 'train', 'validation', 'test'"):
        tasks.omniglot(path, split="all")
    with pytest.raises(ArgumentError, match=r"ways is 5, expected at most 0, the number of classes. Ask for fewer"):
        tasks.omniglot(path, split="test")


@pytest.mark.parametrize("name", ["images_background.zip", "all_runs.zip"])
def test_a_damaged_zip_is_refused_or_read(name: str, tmp_path: Path) -> None:
    """Whatever was cut off or overwritten, nothing but a DataError comes out."""
    files = background({"Latin": 1}, drawers=2) if name.startswith("images") else one_run()
    path = write_zip(tmp_path / name, files)
    load = tasks.omniglot if name.startswith("images") else tasks.omniglot_runs
    options = {"ways": 1, "queries": 0} if name.startswith("images") else {}
    whole = path.read_bytes()
    choose = random.Random(0)
    refused = 0
    for attempt in range(150):
        damaged = bytearray(whole)
        if attempt % 3 == 0:
            damaged = damaged[: choose.randrange(len(whole))]
        else:
            for _ in range(choose.randrange(1, 6)):
                damaged[choose.randrange(len(whole))] = choose.randrange(256)
        path.write_bytes(damaged)
        try:
            load(path, **options)
        except DataError:
            refused += 1
    assert refused > 75


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"<html>not found</html>"])
def test_a_foreign_zip_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "images_background.zip").write_bytes(content)
    with pytest.raises(
        DataError, match=r"images_background.zip is truncated or not a zip .* Download the archives from"
    ):
        tasks.omniglot(tmp_path)


def test_without_pillow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_zip(tmp_path / "images_background.zip", background({"Latin": 1}))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(
        MissingExtraError, match=r"Pillow.* is not installed. Install the extra 'demo'.* \"\.\[demo\]\""
    ):
        tasks.omniglot(path, ways=1)


@published
def test_the_published_small_archives() -> None:
    counts = {}
    for split in ("train", "validation", "test"):
        sampler = tasks.omniglot(OMNIGLOT, ways=5, shots=5, queries=15, split=split)
        counts |= Counter(alphabet for alphabet, _ in sampler.classes)
        assert sampler.bank.examples == 20
        images = sampler.sample(seed=0).support[0]
        assert images.shape == (25, 1, 28, 28)
        assert 0.02 < images.mean() < 0.2
    background = {"Balinese": 24, "Greek": 24, "Korean": 40, "Latin": 26, "Sanskrit": 42}
    assert counts == background | {"Early_Aramaic": 22} | {"Japanese_(katakana)": 47, "Tagalog": 17}
    assert sum(counts.values()) == 242
    turned = tasks.omniglot(OMNIGLOT, split="validation", rotations=True)
    assert len(turned.classes) == 4 * 22


@published
@pytest.mark.parametrize(
    ("archive", "characters"),
    [
        ("small1", {"train": 114, "validation": 22, "background": 136}),
        ("small2", {"train": 92, "test": 64, "background": 156}),
    ],
)
def test_a_published_archive_by_itself(archive: str, characters: dict[str, int]) -> None:
    path = OMNIGLOT / f"images_background_{archive}.zip"
    assert {split: len(tasks.omniglot(path, ways=1, split=split).classes) for split in characters} == characters


@published
def test_a_published_drawing_is_that_of_the_archive() -> None:
    task = tasks.omniglot(OMNIGLOT, ways=22, shots=20, queries=0, split="validation", size=105).sample(seed=0)
    label = task.spec.index(("Early_Aramaic", "character03"))
    with zipfile.ZipFile(OMNIGLOT / "images_background_small1.zip") as archive:
        names = [name for name in archive.namelist() if "Early_Aramaic/character03/" in name and name.endswith(".png")]
        expected = {(np.asarray(Image.open(archive.open(name)).convert("L")) > 0).tobytes() for name in names}
    images = task.support[0][task.support[1] == label, 0]
    assert {(image == 0).numpy().tobytes() for image in images} == expected
    assert len(expected) == 20


def points(image: Tensor) -> Tensor:
    """The places of the ink, around their mean: [points, 2]."""
    places = (image[0] > 0.5).nonzero().float()
    return places - places.mean(0)


def modified_hausdorff_error(runs: list[tasks.Task]) -> float:
    """Share of the test images whose nearest training image, by the modified Hausdorff distance, is of another class.

    Dubuisson and Jain 1994: the larger of the two mean distances from a point of one to the nearest point of the other.
    """
    wrong = total = 0
    for run in runs:
        assert run.query is not None
        training = [points(image) for image in run.support[0]]
        every = torch.cat(training)
        for image, truth in zip(*run.query, strict=True):
            test = points(image)
            squares = (test**2).sum(1, keepdim=True) + (every**2).sum(1)
            between = (
                torch.addmm(squares, test, every.T, alpha=-2).clamp(min=0).split([len(each) for each in training], 1)
            )
            distances = [max(each.amin(0).sqrt().mean(), each.amin(1).sqrt().mean()) for each in between]
            wrong += min(range(len(training)), key=distances.__getitem__) != truth
            total += 1
    return wrong / total


@published
def test_the_published_runs_are_recognized_in_part() -> None:
    """At a third of the size the baseline errs about as often as at the full one; by chance it would in 0.95."""
    runs = tasks.omniglot_runs(OMNIGLOT, size=35)
    assert [run.spec for run in runs] == [f"run{number:02}" for number in range(1, 21)]
    assert all(sorted(run.query[1].tolist()) == list(range(20)) for run in runs if run.query)
    assert 0.3 < modified_hausdorff_error(runs) < 0.45


@pytest.mark.slow
@published
def test_the_published_baseline_error_of_the_runs_is_reproduced() -> None:
    assert modified_hausdorff_error(tasks.omniglot_runs(OMNIGLOT, size=105)) == 0.3875
