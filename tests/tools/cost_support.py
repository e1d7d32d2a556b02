"""A machine whose speeds are round numbers."""

from nacre.tools.cost.grid import Grid
from nacre.tools.cost.speed import Calls, Speeds
from nacre.tools.cost.tables import PROBES


def constant(axes: int, speed: float) -> Grid:
    """A table of one point: so much work a second at any size."""
    return Grid(((1,),) * axes, (1.0,), (speed,))


SPEEDS = Speeds(
    best={"float32": 2e9},
    # a billion FLOPs a second where there are three sizes, as products have them, and a million bytes elsewhere
    grids={
        "float32": {
            kind: constant(len(probe.axes), 1e9 if len(probe.axes) > 2 else 1e6) for kind, probe in PROBES.items()
        }
    },
    copies={2**10: 1e7, 2**20: 1e6},
    fresh=1e-6,
    calls=Calls(module=1e-4, torch=(1e-3, 2e-3), own=(5e-3, 6e-3), view=(1e-5, 2e-5), start=3e-3),
)
