"""Found: what a training run found, beside the parameters."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version


@dataclass(frozen=True)
class Found:
    """What a training run found, beside the parameters.

    Attributes
    ----------
    n_cells, n_train : int
        Cells in the data, and those of them that were trained on.
    best_epoch : int
        Epoch whose parameters were kept: a row of the history.
    plate_nesting : int
        How many plates of the programs stand inside each other.
    parameters_of_each_cell : bool
        Whether there are any: then questions are about the cells of the fit only.
    replayed : bool or str
        True if steps were recorded and replayed; else why not.
    threads : tuple of int
        How many threads torch had on the CPU, which last digits depend on: one number, unless other programs
        used the cores and the fit went on with fewer.
    data : str
        Fingerprint of the counts: data of another one are other data.
    versions : dict of str to str
        Of Python, pyrosc, torch, pyro-ppl, numpy and anndata.
    """

    n_cells: int
    n_train: int
    best_epoch: int
    plate_nesting: int
    parameters_of_each_cell: bool
    replayed: bool | str
    threads: tuple[int, ...]
    data: str
    versions: Mapping[str, str]


def versions() -> dict[str, str]:
    """Return the versions that a fit's last digits depend on."""
    names = ("pyrosc", "torch", "pyro-ppl", "numpy", "anndata")
    return {name: _version(name) for name in names} | {"python": platform.python_version()}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # found on the path, and not installed
        return "not installed"
