"""Generative stories, one per file; models never import each other."""

from pyrosc.models.vae import VAE

__all__ = ["VAE"]
