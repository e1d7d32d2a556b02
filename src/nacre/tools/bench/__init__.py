"""nacre bench: run.py, then worker.py, sides.py, agreement.py, measuring.py, ceilings.py and results.py, in this order.

Nothing here imports a plotting or terminal library until a report is shown: ``show.py`` and ``chart.py`` do.
"""

from nacre.tools.bench.results import BenchReport, Ceilings, Row, Side
from nacre.tools.bench.run import bench

__all__ = ["BenchReport", "Ceilings", "Row", "Side", "bench"]
