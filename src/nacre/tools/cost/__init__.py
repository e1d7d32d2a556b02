"""The bill of any model: ``cost`` runs it once without memory and writes what each call of a module costs."""

from nacre.tools.cost.compare import Comparison, compare
from nacre.tools.cost.report import CostReport, CostRow
from nacre.tools.cost.run import CostError, cost

__all__ = ["Comparison", "CostError", "CostReport", "CostRow", "compare", "cost"]
