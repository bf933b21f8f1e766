"""Pictures of a fit, a latent space, an imputation, a table: matplotlib, without pyplot.

Every function draws into the Axes it is given, or into a new figure, and returns the Axes; nothing global is
read or changed. To keep a picture: ``plots.history(fit).figure.savefig("history.png")``.
"""

from pyrosc.plots.cells import embedding, layout
from pyrosc.plots.differential import calibration, volcano
from pyrosc.plots.expression import imputed_against_observed
from pyrosc.plots.training import history

__all__ = ["calibration", "embedding", "history", "imputed_against_observed", "layout", "volcano"]
