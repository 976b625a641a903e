"""Few-shot classification of handwritten characters: Omniglot, from its published archives."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from os import PathLike

import torch
from torch import Tensor

from funcmeta._check import check_choice, check_count, check_device, check_flag, check_floating
from funcmeta._errors import DataError
from funcmeta.tasks._archive import read_matching
from funcmeta.tasks._drawings import average_areas, decode
from funcmeta.tasks._few_shot import ClassName, FewShot
from funcmeta.tasks._task import Task

SIDE = 105
"""Pixels a side of a published image."""

EVALUATION = (
    *("Angelic", "Atemayar_Qelisayer", "Atlantean", "Aurek-Besh", "Avesta", "Ge_ez", "Glagolitic", "Gurmukhi"),
    *("Kannada", "Keble", "Malayalam", "Manipuri", "Mongolian", "Old_Church_Slavonic_(Cyrillic)", "Oriya"),
    *("Sylheti", "Syriac_(Serto)", "Tengwar", "Tibetan", "ULOG"),
)
VALIDATION = ("Early_Aramaic", "Hebrew", "Malay_(Jawi_-_Arabic)", "Syriac_(Estrangelo)")
TEST = (*EVALUATION, "Japanese_(hiragana)", "Japanese_(katakana)", "Tagalog")

SPLITS: dict[str, Callable[[str], bool]] = {
    "train": lambda alphabet: alphabet not in (*VALIDATION, *TEST),
    "validation": lambda alphabet: alphabet in VALIDATION,
    "test": lambda alphabet: alphabet in TEST,
    "background": lambda alphabet: alphabet not in EVALUATION,
    "evaluation": lambda alphabet: alphabet in EVALUATION,
}
"""Which alphabets each split holds: ours in three parts, and the published one in two."""

_TURNS = ("", " turned by 90", " turned by 180", " turned by 270")
_ADVICE = "Download the archives from https://github.com/brendenlake/omniglot (folder python) and pass their folder."


def omniglot(
    path: str | PathLike[str],
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    split: str = "train",
    *,
    size: int = 28,
    rotations: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> FewShot:
    """Few-shot classification of handwritten characters, each drawn by 20 people.

    Reads ``images_background.zip``, ``images_evaluation.zip``, ``images_background_small1.zip`` and
    ``images_background_small2.zip``, or the unpacked folders, or any of them; a drawing that stands in several counts
    once. An alphabet is in the same split whatever else is there. Test: the 20 alphabets of ``images_evaluation``, both
    Japanese ones and Tagalog. Validation: Early Aramaic, Hebrew, Jawi and Estrangelo. Train: all others. So the 242
    characters of the two small archives are 156 to train with (Balinese, Greek, Korean, Latin, Sanskrit), 22 for
    validation (Early Aramaic) and 64 to test with (Katakana, Tagalog). The published split, which the runs of
    `omniglot_runs` keep to, is another: "evaluation" is the 20 alphabets of ``images_evaluation``, "background" all
    others. With a small archive as ``path``, "background" is the published minimal split.

    Args:
        path: a folder with the archives, or one archive, or an unpacked folder.
        ways: classes a task.
        shots: support examples a class; no drawing is both in support and query.
        queries: query examples a class; 0 for tasks without a query.
        split: ``"train"``, ``"validation"`` or ``"test"``; or, as published, ``"background"`` or ``"evaluation"``.
        size: pixels a side, by averaging over areas of the published 105 x 105.
        rotations: whether each character turned by 90, 180 and 270 degrees is a class of its own.
        dtype: floating-point dtype of the images.
        device: where the images are kept and returned.

    Returns:
        A sampler of tasks with images [ways · shots, 1, size, size], ink 1 and paper 0, and labels [ways · shots].

    Raises:
        DataError: two characters of the split have different numbers of drawings.

    Examples:
        >>> omniglot("folder/without/archives")
        Traceback (most recent call last):
        ...
        funcmeta._errors.DataError: folder/without/archives does not exist, expected a zip or a folder. Download...

    Source:
        Lake, Salakhutdinov and Tenenbaum 2015 (doi:10.1126/science.aab3050); the rotations are those of Santoro et al.
        2016 (arXiv:1605.06065), section 4.1.
    """
    check_choice("split", split, SPLITS)
    check_count("size", size)
    check_floating(dtype)
    check_device(device)
    pattern = r"([^/]+)/(character\d+)/(\d+_\d+\.png)"
    files = read_matching(path, pattern, archives="images_*.zip", advice=_ADVICE)
    wanted = [name for name in files if SPLITS[split](name[0])]
    names: list[ClassName] = []
    pictures: list[Tensor] = []
    for (alphabet, character), drawings in groupby(wanted, key=lambda name: name[:2]):
        ink = torch.stack([decode(files[name], "/".join(name), SIDE) for name in drawings])
        names.append((alphabet, character))
        pictures.append(average_areas(ink, size, dtype).to(device))
        if len(ink) != len(pictures[0]):
            raise DataError(
                f"{alphabet}/{character} has {len(ink)} drawings, but {'/'.join(names[0])} has {len(pictures[0])}, "
                f"expected the same number of each. {_ADVICE}"
            )
    check_flag("rotations", rotations)
    if rotations:
        names = [(alphabet, character + turn) for alphabet, character in names for turn in _TURNS]
    bank = torch.stack(pictures) if pictures else torch.empty(0, 0, size, size)
    return FewShot(_Drawings(names, bank, len(_TURNS) if rotations else 1), ways, shots, queries)


@dataclass(frozen=True, eq=False)
class _Drawings:
    """Drawings [characters, examples, size, size]; each character gives so many classes, by turning it."""

    names: Sequence[ClassName]
    pictures: Tensor
    turns: int

    @property
    def examples(self) -> int:
        """How many people drew each character."""
        return self.pictures.shape[1]

    def noise(self, ways: int, examples: int, generator: torch.Generator) -> Tensor:
        """Which drawings are taken, without replacement: [ways, examples]."""
        return torch.rand(ways, self.examples, generator=generator).argsort(1)[:, :examples]

    def images(self, classes: Tensor, noise: Tensor) -> Tensor:
        """The drawings of the classes' characters, turned as the classes ask."""
        classes, noise = classes.to(self.pictures.device), noise.to(self.pictures.device)
        upright = self.pictures[(classes // self.turns)[..., None], noise][..., None, :, :]
        turn = (classes % self.turns)[..., None, None, None, None]
        turned = [torch.where(turn == quarter, upright.rot90(quarter, (-2, -1)), 0) for quarter in range(self.turns)]
        return torch.stack(turned).sum(0)


def omniglot_runs(
    path: str | PathLike[str],
    *,
    size: int = 28,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> list[Task]:
    """The 20 one-shot classification tasks on which people and models were compared.

    In each, 20 characters of an alphabet drawn by one person are to be recognized as another person drew them.

    Args:
        path: ``all_runs.zip``, the folder that holds it, or the unpacked folder.
        size: pixels a side, by averaging over areas of the published 105 x 105.
        dtype: floating-point dtype of the images.
        device: where the images are returned.

    Returns:
        A task for each run: the 20 training images [20, 1, size, size] with labels 0 to 19 are the support, the 20 test
        images with their true labels the query, and the name of the run is the ``spec``.

    Raises:
        DataError: the labels of a run are missing or name an image that is not there.

    Examples:
        >>> omniglot_runs("folder/without/archives")
        Traceback (most recent call last):
        ...
        funcmeta._errors.DataError: folder/without/archives does not exist, expected a zip or a folder. Download...

    Source:
        Lake, Salakhutdinov and Tenenbaum 2015 (doi:10.1126/science.aab3050), published as ``all_runs.zip``.
    """
    check_count("size", size)
    check_floating(dtype)
    check_device(device)
    pattern = r"(run\d+)/((?:training/class\d+|test/item\d+)\.png|class_labels\.txt)"
    files = read_matching(path, pattern, archives="all_runs.zip", advice=_ADVICE)
    tasks = []
    for run, members in groupby(files, key=lambda name: name[0]):
        images = {f"{run}/{name}": files[run, name] for _, name in members if name.endswith(".png")}
        training = [name for name in images if "/training/" in name]
        text = files.get((run, "class_labels.txt"), b"").decode("ascii", "replace")
        pairs = [line.split() for line in text.splitlines()]
        if not pairs or any(len(pair) != 2 or pair[0] not in images or pair[1] not in training for pair in pairs):
            raise DataError(f"{run}/class_labels.txt is missing or names an image that is not. {_ADVICE}")
        ink = [decode(images[name], name, SIDE) for name in [*training, *[test for test, _ in pairs]]]
        pictures = average_areas(torch.stack(ink)[:, None], size, dtype).to(device)
        truth = torch.tensor([training.index(answer) for _, answer in pairs], device=device)
        support = (pictures[: len(training)], torch.arange(len(training), device=device))
        tasks.append(Task(support, (pictures[len(training) :], truth), run))
    return tasks
