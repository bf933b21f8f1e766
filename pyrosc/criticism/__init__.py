"""Is the fit any good: counts split in two to score it on, and what a fit without structure would say."""

from pyrosc.criticism.baseline import NoStructure, baseline
from pyrosc.criticism.thinning import thin

__all__ = ["NoStructure", "baseline", "thin"]
