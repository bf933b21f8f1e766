"""Similarities of cells, and their divergence from those of points of a plane, as in t-SNE."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def similarities(
    t: Float[Tensor, "cells genes"], perplexity: float, n_steps: int = 30
) -> Float[Tensor, "cells cells"]:
    """Return p(j given i): a normal kernel of t, as wide for each cell as has this perplexity; rows sum to 1.

    Parameters
    ----------
    t
        Values, a row a cell.
    perplexity
        exp of each row's entropy; with few cells, as large as it can be.
    n_steps
        Halvings of the interval of the log width.
    """
    n = len(t)
    if n == 1:
        return t.new_zeros(1, 1)
    with torch.no_grad():
        squared = torch.cdist(t, t, compute_mode="donot_use_mm_for_euclid_dist").square()
        squared = squared / squared.mean().clamp_min(1e-12)
        itself = torch.eye(n, dtype=torch.bool, device=t.device)
        low, high = t.new_full((n, 1), -15.0), t.new_full((n, 1), 15.0)
        wanted = math.log(min(perplexity, n - 1))
        for _ in range(n_steps):
            middle = (low + high) / 2
            log_p = (-squared * middle.exp()).masked_fill(itself, -torch.inf).log_softmax(1)
            entropy = -(log_p.exp() * log_p.masked_fill(itself, 0.0)).sum(1, keepdim=True)
            low, high = (
                torch.where(entropy > wanted, middle, low),
                torch.where(entropy > wanted, high, middle),
            )
        return log_p.exp()


def divergence(
    p: Float[Tensor, "cells cells"], z: Float[Tensor, "*draws cells latent"]
) -> Float[Tensor, "*draws cells"]:
    """Return each cell's KL of p from q(j given i), a Student-t kernel of z with one degree of freedom.

    Parameters
    ----------
    p
        Similarities, rows sum to 1.
    z
        Points.
    """
    n = len(p)
    if n == 1:
        return z.new_zeros(z.shape[:-1])
    squared = (z.unsqueeze(-2) - z.unsqueeze(-3)).square().sum(-1)
    itself = torch.eye(n, dtype=torch.bool, device=z.device)
    log_q = (-torch.log1p(squared)).masked_fill(itself, -1e9).log_softmax(-1)
    return (p * (p.clamp_min(1e-12).log() - log_q)).masked_fill(itself, 0.0).sum(-1)
