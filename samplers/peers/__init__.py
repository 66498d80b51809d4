"""Solvers of other papers that need more than a name and an NFE: a teacher's trajectory, or a table that somebody learned.

Everything here returns a `SolverSchedule`; tables are read as data, their authors' code is never run.
"""

from .gits import Trajectory, cheapest_path, gits, gits_cost, teacher_trajectory
from .learned import from_bns, from_dyweight, from_gs, from_s4s, stick_breaking
from .midpoints import Midpoint, amed, from_adasde, from_epd, from_midpoints
from .reading import read_table
from .rows import Row, compiled_rows, from_rows
from .times import compensated, cumulative_softmax, decoupled, fit_compensation, fit_evaluation_times, from_ld3
from .usf import load_usf

__all__ = [
    "Midpoint",
    "Row",
    "Trajectory",
    "amed",
    "cheapest_path",
    "compensated",
    "compiled_rows",
    "cumulative_softmax",
    "decoupled",
    "fit_compensation",
    "fit_evaluation_times",
    "from_adasde",
    "from_bns",
    "from_dyweight",
    "from_epd",
    "from_gs",
    "from_ld3",
    "from_midpoints",
    "from_rows",
    "from_s4s",
    "gits",
    "gits_cost",
    "load_usf",
    "read_table",
    "stick_breaking",
    "teacher_trajectory",
]
