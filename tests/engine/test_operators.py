"""The loops as operators of torch's: schemas that say what is written, and shapes without numbers."""

import subprocess
import sys

import pytest
import torch
from torch.library import opcheck

from pyrosc.engine import operators


def some(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.1


X = torch.poisson(some(6, 9), generator=torch.Generator().manual_seed(1))
LOGITS, TOTAL, THETA, WEIGHT = some(6, 9), 10 * some(6, 1), some(1, 9), some(6)
SPARSE = X * (some(6, 9, seed=2) < 0.3)
ENDS = (SPARSE != 0).sum(1).cumsum(0)
AT = (torch.cat([torch.tensor([0]), ENDS[:-1]]), ENDS, SPARSE.nonzero()[:, 1].int(), SPARSE[SPARSE != 0])
LISTED = operators.log1p_linear(SPARSE, some(9, 4), None, None, None, None, True)[1:]
SLOPES = operators.softmax_density(LOGITS, TOTAL, X, THETA, None, None, [True, True, False])[1:]

CALLS = {
    "log_density": [
        (X, LOGITS, THETA, LOGITS, [True, False, True]),
        (X, LOGITS[:1], None, None, [True, False, False]),
    ],
    "softmax_density": [
        (LOGITS, TOTAL, X, THETA, LOGITS, THETA, [True, True, True]),
        (LOGITS[:2], TOTAL[:1], X, None, None, None, [False, False, False]),
    ],
    "softmax_density_backward": [
        (WEIGHT, *SLOPES, [False, True, False]),
        (WEIGHT, *SLOPES, [True, False, True]),
    ],
    "weighted_softmax_density_": [
        (LOGITS.clone(), some(9), some(6, 9), some(9), TOTAL, X, THETA, None, WEIGHT),
        (LOGITS.clone(), None, None, None, TOTAL, X, None, THETA, WEIGHT),
    ],
    "log1p_linear": [
        (SPARSE, some(9, 4), None, None, None, None, True),
        (SPARSE, some(9, 4), *AT, False),
        (X + 1, some(9, 4), None, None, None, None, True),
    ],
    "log1p_linear_slope": [
        (some(6, 4), SPARSE, *LISTED),
        (some(6, 4), X, *(part[:0] for part in LISTED)),
    ],
    "kept": [(torch.tensor([7]), 30, 1 << 14)],
}


def test_every_operator_is_checked():
    known = {
        name.removeprefix("pyrosc::") for name in torch._C._dispatch_get_all_op_names() if "pyrosc::" in name
    }
    assert known == set(CALLS)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "i"), [(name, i) for name, calls in CALLS.items() for i in range(len(calls))]
)
def test_an_operator_is_what_its_schema_says_and_has_shapes_without_numbers(name, i):
    opcheck(getattr(torch.ops.pyrosc, name).default, CALLS[name][i])


@pytest.mark.parametrize("name", [name for name in CALLS if name != "log1p_linear"])
def test_shapes_on_no_device_are_those_on_a_cpu(name):
    operator = getattr(torch.ops.pyrosc, name)
    for call in CALLS[name]:
        there = [part.to("meta") if isinstance(part, torch.Tensor) else part for part in call]
        shapes = lambda result: [t.shape for t in (result if isinstance(result, tuple) else (result,))]
        assert shapes(operator(*there)) == shapes(operator(*call))


def test_torchs_compiler_is_not_imported():
    code = (
        "import sys, torch\n"
        "from pyrosc.engine import operators\n"
        "one = torch.ones(2, 3)\n"
        "torch.ops.pyrosc.log_density(one, one, None, None, [True, False, False])\n"
        "torch.ops.pyrosc.log1p_linear(one, torch.ones(3, 2), None, None, None, None, True)\n"
        "print({'torch._dynamo', 'sympy'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
