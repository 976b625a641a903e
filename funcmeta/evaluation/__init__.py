"""Learned optimizers against tuned ones, on trainings that neither has seen."""

from funcmeta.evaluation._evaluate import BASELINES, RATES, Course, evaluate_optimizers
from funcmeta.evaluation._report import OptimizerEvaluation
from funcmeta.evaluation._rows import EvaluationRow

__all__ = ["BASELINES", "RATES", "Course", "EvaluationRow", "OptimizerEvaluation", "evaluate_optimizers"]
