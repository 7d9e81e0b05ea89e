"""Predicting loss: scaling laws fitted to a table of runs, with intervals (numpy only; no Ray, no torch)."""

from .fitting import fit
from .predictions import predict
from .scoring import score
from .table import read_table

__all__ = ["fit", "predict", "read_table", "score"]
