"""Bias and variance of meta-gradients against the number of inner steps."""

from funcmeta.horizon._measure import horizon_report
from funcmeta.horizon._report import HorizonReport
from funcmeta.horizon._row import HorizonRow

__all__ = ["HorizonReport", "HorizonRow", "horizon_report"]
