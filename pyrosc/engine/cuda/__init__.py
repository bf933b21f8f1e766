"""Kernels for CUDA, compiled by Triton."""
