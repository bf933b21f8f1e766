"""Cells and a fit that several of these tests ask about."""

import numpy as np
import pytest


@pytest.fixture
def few(data):
    """Twelve cells."""
    return data[np.arange(12)]


@pytest.fixture
def exact(data):
    """A fit whose guide is the posterior."""
    import pairs  # not before jaxtyping's hook is in place

    return pairs.untrained(pairs.Conjugate(data.share), data)
