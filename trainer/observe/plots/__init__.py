"""Plots of a run."""

from .run import plot_run

__all__ = ["plot_run"]
