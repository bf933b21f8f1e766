"""Differential expression: counts and a design in, a table out. Its first half knows no Fit."""
