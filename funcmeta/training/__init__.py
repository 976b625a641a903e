"""Meta-training as people run it: resumable, on several processes, watched."""

from funcmeta.training._autocast import autocast
from funcmeta.training._evaluation import Evaluation, Mean, Validation, evaluate
from funcmeta.training._fit import Fitted, fit
from funcmeta.training._folder import Folder, Record
from funcmeta.training._meta_file import load, save
from funcmeta.training._progress import progress
from funcmeta.training._report import report
from funcmeta.training._run import Alarm
from funcmeta.training._tensorboard import tensorboard

__all__ = [
    "Alarm",
    "Evaluation",
    "Fitted",
    "Folder",
    "Mean",
    "Record",
    "Validation",
    "autocast",
    "evaluate",
    "fit",
    "load",
    "progress",
    "report",
    "save",
    "tensorboard",
]
