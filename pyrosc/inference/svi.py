"""fit_svi: stochastic variational inference of any model and guide. It knows no model and no site."""

from typing import Any

import anndata
import torch
from pyro.infer import ELBO

from pyrosc.data.counts import Counts
from pyrosc.data.read import as_counts
from pyrosc.engine.cpu.contention import watched
from pyrosc.inference.contract import elbo_of, pair
from pyrosc.inference.fit import Fit
from pyrosc.inference.found import Found, versions
from pyrosc.inference.handlers import leaving_out
from pyrosc.inference.isolation import copied, device_of, isolated, modules_of
from pyrosc.inference.loop import train
from pyrosc.inference.settings import SETTINGS, check_made_for, resolved, split
from pyrosc.inference.step import Problem


def fit_svi(
    model: Any,
    data: Counts | anndata.AnnData,
    guide: Any = None,
    *,
    epochs: int | None = None,
    minibatch_size: int = 128,
    learning_rate: float = 5e-3,
    kl_warmup: int | None = None,
    kl_weight: float = 1.0,
    validation: float | None = None,
    patience: int | None = None,
    weight_decay: float | None = None,
    clip_norm: float | None = None,
    elbo: ELBO | type[ELBO] | None = None,
    precision: str = "float32",
    replay: bool | None = None,
    device: str | torch.device = "auto",
    seed: int = 0,
    progress: bool = True,
) -> Fit:
    """Fit a model and a guide by stochastic variational inference.

    Parameters
    ----------
    model
        An object with the methods ``model`` and ``guide``, or a model alone: a callable of
        :class:`~pyrosc.Cells`. It is copied, and left untrained.
    data
        Counts, or an AnnData with counts in X.
    guide
        The guide, where `model` has none: a callable of Cells, or one of Pyro's autoguides.
    epochs
        Passes over the training cells at most; by default the attribute ``epochs`` of `model`, else chosen
        from the data, see :func:`planned_epochs`.
    minibatch_size
        Cells in a step.
    learning_rate
        Of Adam, at its peak: it rises over the first tenth of the planned steps and falls along a cosine to
        zero at the end.
    kl_warmup
        Steps over which the KL weight rises from zero to `kl_weight`; a tenth of the planned steps by
        default, and never more than half of them, so that every fit ends at `kl_weight`.
    kl_weight
        Weight of the KL at the end: 1 is the ELBO, more is a beta-VAE.
    validation
        Share of the cells kept out of the training to measure the loss after each epoch; the parameters of
        the best epoch are the fit's. 0 trains on all cells to the end; programs with parameters of each cell
        need that, since a validation cell has none. By default the attribute ``validation`` of `model`, else
        .1.
    patience
        Stop after so many epochs without a better validation loss; a sixth of the planned epochs by default,
        and at least 5.
    weight_decay
        Precision of a normal prior on every (unconstrained) parameter: half of this times the sum of their
        squares, in nats for all cells together, is added to what is minimised, not to the loss reported. By
        default the attribute ``weight_decay`` of `model`, else 0.
    clip_norm
        Gradients longer than this are shortened to it; by default the attribute ``clip_norm`` of `model`, if
        it has one.
    elbo
        A Pyro ELBO; by default the attribute ``elbo`` of `model`, else :class:`pyro.infer.Trace_ELBO`.
    precision
        Of the linear layers' products in training: ``"float32"``, or ``"bfloat16"``, sooner on processors
        that have it. All else, the parameters, and every question to the fit are float32.
    replay
        Whether one step's tensor operations may be recorded and replayed, which is faster: a promise that the
        programs are pure, see Notes. By default the attribute ``pure`` of `model` (and of a separate guide);
        pyrosc's own models are pure.
    device
        ``"auto"`` takes CUDA where there is one.
    seed
        Of the split, the minibatches and the draws. The same seed, device, number of threads and versions
        give the same bits.
    progress
        Show a progress bar.

    Returns
    -------
    Fit
        With ctrl-C, the fit so far.

    Raises
    ------
    TypeError
        If `model` is no model or there is no guide.
    ValueError
        If the data or a setting is out of range, or the programs don't fit each other.
    FloatingPointError
        If the loss is no longer finite; the message names the site.

    Examples
    --------
    >>> import pyrosc
    >>> data = pyrosc.from_anndata(pyrosc.datasets.simulate(60, 30, seed=1))
    >>> vae = pyrosc.VAE.for_data(data, n_latent=2, hidden=(8,))
    >>> fit = pyrosc.fit_svi(vae, data, epochs=3, progress=False)
    >>> list(fit.history)
    ['train', 'validation', 'kl_z', 'kl_l', 'kl_weight', 'learning_rate', 'seconds']
    >>> fit.settings["epochs"], fit.found.n_train, fit.found.replayed
    (3, 54, 'the fit has few steps')

    Notes
    -----
    A part of a model whose parameters are all frozen (``requires_grad_(False)``) runs in evaluation mode.

    The loss is Pyro's own: with ``kl_weight=1`` and no warm-up a step has the loss and the gradients of
    ``pyro.infer.SVI.step``, divided by the number of cells.

    A program is run as it is written, in every step, unless it is pure: what it computes depends on the
    cells, on parameters and buffers, and on torch's random numbers alone, and Python acts the same in each
    step. A schedule kept in an attribute, a count of calls, an average of weights in a plain tensor are not
    pure.
    Of pure programs, if more than fifty steps are to come, the first three are run; then one step's tensor
    operations are recorded, rewritten, compared with the programs on other cells, and replayed. What is
    replayed is checked again after every hundred steps, at the end of an epoch, and at the end: a step is
    taken both ways from the same state. If they differ, or what the programs can reach has changed, the fit
    goes back to the last check, runs its programs from there, and the logger ``pyrosc`` says so.
    ``fit.found.replayed`` is True, or says why steps were run.

    Pyro's handlers, parameter store and random numbers are the process's, so fits in several threads take
    turns: one fits while others wait. Use processes to fit at the same time.
    """
    asked = {name: value for name, value in locals().items() if name in SETTINGS}
    if isinstance(model, Fit):
        msg = "this is a Fit: pyrosc.fit_svi(fit.program, ...) trains its model on, fit_query on new batches"
        raise TypeError(msg)
    data = as_counts(data)
    if not data.n_cells:
        msg = "no cells: the selection is empty"
        raise ValueError(msg)
    settings = resolved(asked, model, guide, elbo_of(model, elbo), data.n_cells)
    check_made_for(model, data)
    on = device_of(device)
    program, separate_guide = copied(model, guide)
    modules = modules_of(program, separate_guide)
    for module in modules:
        module.to(on)
    rows = split(data.n_cells, settings["validation"], settings["seed"])
    params: dict[str, Any] = {"params": {}, "constraints": {}}
    counts = data.on(on)
    n_entries = settings["minibatch_size"] * data.n_genes
    with isolated(on, settings["seed"], params), watched(n_entries) as threads:
        chosen, variational = pair(program, separate_guide)
        problem = Problem(
            leaving_out(chosen, data.schema),
            variational,
            elbo=elbo_of(program, elbo),
            modules=modules,
            train=counts.take(torch.as_tensor(rows[0], device=on)),
            validation=counts.take(torch.as_tensor(rows[1], device=on)),
            threads=threads,
        )
        history, learned = train(problem, settings, progress)
    found = Found(
        n_cells=data.n_cells, n_train=len(rows[0]), data=data.fingerprint, versions=versions(), **learned
    )
    return Fit(program, separate_guide, params, data.schema, history, settings, found, on)
