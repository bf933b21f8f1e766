"""Loops over counts on a CPU, compiled by numba: one operation a file."""
