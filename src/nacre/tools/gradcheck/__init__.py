"""nacre.gradcheck: checker.py, then subject.py, numeric.py, compare.py and report.py, to be read in this order."""

from nacre.tools.gradcheck.checker import gradcheck
from nacre.tools.gradcheck.report import GradientError, GradientReport, GradientResult

__all__ = ["GradientError", "GradientReport", "GradientResult", "gradcheck"]
