"""Count distributions: exact, stable in float32, and fast where most counts are zero."""

from pyrosc.distributions.counts import NegativeBinomial, Poisson, ZeroInflated
from pyrosc.distributions.spike_slab import SpikeSlab

__all__ = ["NegativeBinomial", "Poisson", "SpikeSlab", "ZeroInflated"]
