"""Moments and quantiles over draws."""

import numpy as np
import pytest
import torch

from pyrosc.posterior import intervals

# --- the summary


@pytest.mark.parametrize("n_draws", [1, 2, 3, 25, 200])
def test_the_moments_and_quantiles_over_draws_are_numpys(n_draws):
    values = torch.rand(n_draws, 7, 11, generator=torch.Generator().manual_seed(n_draws))
    torch.testing.assert_close(intervals._variance(values, values.mean(0)), values.var(0, correction=0))
    for share in (0.0005, 0.05, 0.25, 0.45):
        low, high = intervals._low_quantile(values, share), -intervals._low_quantile(-values, share)
        for ours, at in ((low, share), (high, 1 - share)):
            theirs = np.quantile(values.numpy(), at, 0, method="weibull")
            np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-5, atol=1e-6)


def test_an_interval_of_counts_reaches_out_to_whole_ones():
    low, high = intervals._whole((torch.tensor([0.55, 2.0]), torch.tensor([3.2, 4.0])))
    assert low.tolist() == [0, 2]
    assert high.tolist() == [4, 4]
