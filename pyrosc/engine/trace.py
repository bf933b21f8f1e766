"""The operations that a function of tensors runs, as a graph of torch.fx that runs them again.

Torch's own make_fx does this too; its first call imports a computer algebra system, which takes a second and
140 MB, to write down shapes that vary. Here all shapes are as they were.
"""

from collections.abc import Callable, Sequence
from operator import getitem
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

_aten = torch.ops.aten


class _Made(NamedTuple):
    """What the tensor looks like that an operation returns."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def traced(function: Callable[..., Any], arguments: Sequence[Tensor]) -> fx.GraphModule:
    """Run a function; return the graph of the operations it ran, with :class:`_Made` as ``meta["made"]``.

    Parameters
    ----------
    function
        Of tensors, to tensors in tuples or lists. What it reads beside them is a constant of the graph,
        itself and not a copy.
    arguments
        What to run it with; the graph takes as many.

    Raises
    ------
    RuntimeError
        If it looks at the numbers in a tensor, the shape of a result depends on them, or an operation is
        given what no graph holds, such as a random generator.
    """
    operations = _Operations(arguments)
    with _NoReading(), operations:
        results = function(*arguments)
    operations.graph.output(tree_map_only(Tensor, operations.node_of, results))
    try:
        return fx.GraphModule(operations.constants, operations.graph)
    except SyntaxError as error:  # (in what torch.fx has written)
        msg = "an operation is given what no recording holds, such as a random generator"
        raise RuntimeError(msg) from error


class _Operations(TorchDispatchMode):
    """Writes down operations as they run, below autograd."""

    def __init__(self, arguments: Sequence[Tensor]) -> None:
        super().__init__()
        self.graph, self.constants = fx.Graph(), nn.Module()
        self._nodes: Any = WeakTensorKeyDictionary()
        for i, argument in enumerate(arguments):
            self._note(argument, self.graph.placeholder(f"argument_{i}"))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch imports its compiler to leave this method out

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator is _aten.lift_fresh.default:  # of a tensor made of numbers, which may be written into
            operator = _aten.lift_fresh_copy.default
        kwargs = kwargs or {}
        _check_shape(operator, args)
        written = tree_map_only(Tensor, self.node_of, (args, kwargs))
        result = operator(*args, **kwargs)
        if not all(isinstance(part, Tensor | None) for part in tree_leaves(result)):
            msg = "a program reads the numbers in a tensor, by item(), float(), bool() or if"
            raise RuntimeError(msg)
        self._note(result, self.graph.call_function(operator, *written))
        return result

    def node_of(self, tensor: Tensor) -> fx.Node:
        """Return where a tensor was made; one that was there before is a constant."""
        if tensor not in self._nodes:
            name = f"given_{len(self.constants._buffers)}"
            self.constants.register_buffer(name, tensor)
            self._note(tensor, self.graph.get_attr(name))
        return self._nodes[tensor]

    def _note(self, result: Any, node: fx.Node) -> None:
        """Remember where the tensors of a result come from."""
        if isinstance(result, Tensor):
            self._nodes[result] = node
            node.meta["made"] = _Made(result.shape, result.stride(), result.dtype, result.device)
            return
        for i, part in enumerate(result or ()):
            if part is not None:
                self._note(part, self.graph.call_function(getitem, (node, i)))


def _check_shape(operator: Any, args: Any) -> None:
    """Raise if the shape of a result depends on numbers, which may differ in other runs."""
    if operator in (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default):
        depends = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    else:
        depends = torch.Tag.dynamic_output_shape in operator.tags
    if depends:
        msg = f"the shape of a result depends on the data, in {operator}"
        raise RuntimeError(msg)


class _NoReading(TorchFunctionMode):
    """Refuses to hand out numbers in ways that are no operations: what is done with them nobody sees."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        reads = name in ("numpy", "tolist", "__array__", "__dlpack__")
        if name in ("tensor", "as_tensor", "asarray") and args and not isinstance(args[0], Tensor):
            reads = any(isinstance(part, Tensor) for part in tree_leaves(args[0]))
        if reads:
            msg = f"a program reads the numbers in a tensor, by {name}()"
            raise RuntimeError(msg)
        return function(*args, **(kwargs or {}))
