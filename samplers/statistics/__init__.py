"""Empirical model statistics of DPM-Solver-v3 (Zheng et al. 2023, arXiv:2310.13268)."""

from .empirical import EmpiricalStatistics

__all__ = ["EmpiricalStatistics"]
