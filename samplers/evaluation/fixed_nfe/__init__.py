"""Quality at a fixed number of network evaluations: sharded runs, results, tables, figures, reports."""

from .plan import Cell, Model
from .report import write_figures, write_report, write_tables
from .results import diff, groups, protocol_of, read_results
from .run import FixedNfeRun, estimate
from .scoring import METRICS
from .workers import Worker

__all__ = [
    "METRICS",
    "Cell",
    "FixedNfeRun",
    "Model",
    "Worker",
    "diff",
    "estimate",
    "groups",
    "protocol_of",
    "read_results",
    "write_figures",
    "write_report",
    "write_tables",
]
