"""Learned optimizers that come with the library."""

from importlib.resources import as_file, files

from funcmeta._check import check_choice
from funcmeta.learned._file import load
from funcmeta.learned._optimizer import LearnedOptimizer

NAMES = ("lstm_quadratics",)


def pretrained(name: str = "lstm_quadratics") -> LearnedOptimizer:
    """A learned optimizer whose meta-training is done.

    ``lstm_quadratics`` is ``lstm()``, trained on random quadratics in 10 dimensions, 100 steps from a standard normal
    start, by ``examples/published/l2l.py --task quadratics --seed 0`` (700 batches of 64 tasks). ``docs/learned.md``
    tells how far it gets.

    Args:
        name: "lstm_quadratics".

    Returns:
        The optimizer; its weights require grad, so that it can be trained further.

    Raises:
        ArgumentError: the name is not known.

    Examples:
        >>> transform = fm.as_transform(fm.learned.pretrained())
        >>> params = {"theta": torch.zeros(3)}
        >>> updates, state = transform.update({"theta": torch.ones(3)}, transform.init(params), params)
        >>> bool((updates["theta"] < 0).all())
        True

    Source: Andrychowicz et al. (2016), section 3.1.
    """
    check_choice("name", name, NAMES)
    with as_file(files("funcmeta.learned") / "data" / f"{name}.safetensors") as path:
        return load(path)
