"""Generative stories, one per file; models never import each other."""

from pyrosc.models.autoencoder import Autoencoder
from pyrosc.models.autoimpute import AutoImpute
from pyrosc.models.autozi import AutoZI
from pyrosc.models.dca import DCA
from pyrosc.models.gaussian_vae import GaussianVAE
from pyrosc.models.gmvae import GMVAE
from pyrosc.models.ldvae import LDVAE
from pyrosc.models.scanvi import SCANVI
from pyrosc.models.scvis import SCVIS
from pyrosc.models.totalvi import TOTALVI
from pyrosc.models.vae import VAE
from pyrosc.models.vasc import VASC
from pyrosc.models.vsc import VSC

__all__ = [
    "DCA",
    "GMVAE",
    "LDVAE",
    "SCANVI",
    "SCVIS",
    "TOTALVI",
    "VAE",
    "VASC",
    "VSC",
    "AutoImpute",
    "AutoZI",
    "Autoencoder",
    "GaussianVAE",
]
