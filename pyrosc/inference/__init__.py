"""Stochastic variational inference of any Pyro model and guide. It knows no model and no site name."""
