"""Discrete diffusion: processes, exact models, transitions, and samplers as data (`DiscreteTable`)."""

from .adapters import LogitsModel, from_log_score, from_logits, to_log_score
from .chains import MarkovModel
from .exact import exact_law, push_table
from .grids import time_grid
from .kernels import draw, nucleus, sharpen
from .laws import (
    countdown_chain,
    is_sudoku,
    one_token_law,
    parity_law,
    random_chain,
    random_mixture,
    sudoku_grids,
    sudoku_model,
)
from .optimised import jump_grid, optimal_count_table, optimal_counts, reveal_losses
from .processes import MaskedProcess, Process, UniformProcess, process_from_dict
from .run import DiscreteRun, Model, iterate_discrete, sample_discrete
from .survival import SurvivalSchedule
from .table import DiscreteTable, resample_table
from .tabular import ProductMixtureModel, SupportModel, TabularModel
from .transitions import CATALOGUE, Transition, transition

__all__ = [
    "CATALOGUE",
    "DiscreteRun",
    "DiscreteTable",
    "LogitsModel",
    "MarkovModel",
    "MaskedProcess",
    "Model",
    "Process",
    "ProductMixtureModel",
    "SupportModel",
    "SurvivalSchedule",
    "TabularModel",
    "Transition",
    "UniformProcess",
    "countdown_chain",
    "draw",
    "exact_law",
    "from_log_score",
    "from_logits",
    "is_sudoku",
    "iterate_discrete",
    "jump_grid",
    "nucleus",
    "one_token_law",
    "optimal_count_table",
    "optimal_counts",
    "parity_law",
    "process_from_dict",
    "push_table",
    "random_chain",
    "random_mixture",
    "resample_table",
    "reveal_losses",
    "sample_discrete",
    "sharpen",
    "sudoku_grids",
    "sudoku_model",
    "time_grid",
    "to_log_score",
    "transition",
]
