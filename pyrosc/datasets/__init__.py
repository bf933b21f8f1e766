"""Data to try things on: simulated counts whose truth is known, and 700 real cells."""

from pyrosc.datasets.pbmc68k import pbmc68k_reduced
from pyrosc.datasets.simulate import simulate, simulate_proteins

__all__ = ["pbmc68k_reduced", "simulate", "simulate_proteins"]
