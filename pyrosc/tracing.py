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


class Made(NamedTuple):
    """What the tensor looks like that an operation returns."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def traced(function: Callable[..., Any], arguments: Sequence[Tensor]) -> fx.GraphModule:
    """Run a function; return the graph of the operations it ran, with :class:`Made` as ``meta["made"]``.

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
        If it looks at the numbers in a tensor that depends on the arguments or is random, or the shape of a
        result depends on them.
    """
    operations = _Operations(arguments)
    with _NoReading(), operations:
        results = function(*arguments)
    operations.graph.output(tree_map_only(Tensor, operations.node_of, results))
    return fx.GraphModule(operations.constants, operations.graph)


class _Operations(TorchDispatchMode):
    """Writes down operations as they run, below autograd."""

    def __init__(self, arguments: Sequence[Tensor]) -> None:
        super().__init__()
        self.graph, self.constants = fx.Graph(), nn.Module()
        self._nodes: Any = WeakTensorKeyDictionary()
        self._fixed: set[fx.Node] = set()  # the same in each run
        for i, argument in enumerate(arguments):
            self._note(argument, self.graph.placeholder(f"argument_{i}"))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch imports its compiler to leave this method out

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator is _aten.lift_fresh.default:  # of a tensor made of numbers, which may be written into
            operator = _aten.lift_fresh_copy.default
        args, kwargs = tuple(args), dict(kwargs or {})
        written = tree_map_only(Tensor, self.node_of, (args, kwargs))
        sources = [node for node in tree_leaves(written) if isinstance(node, fx.Node)]
        fixed = all(node in self._fixed for node in sources)
        fixed = fixed and torch.Tag.nondeterministic_seeded not in operator.tags
        if not fixed:
            self._check_shape(operator, written[0])
        result = operator(*args, **kwargs)
        if not all(isinstance(part, Tensor | None) for part in tree_leaves(result)):
            if not fixed:
                msg = "a program reads the numbers in a tensor, by item(), float(), bool() or if"
                raise RuntimeError(msg)
            return result
        node = self.graph.call_function(operator, *written)
        if fixed:
            self._fixed.add(node)
        self._note(result, node)
        return result

    def _check_shape(self, operator: Any, args: Any) -> None:
        """Raise if the shape of a result depends on numbers, which may differ in other runs."""
        if operator in (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default):
            others = [index for index in args[1] if index is not None and index not in self._fixed]
            depends = any(index.meta["made"].dtype in (torch.bool, torch.uint8) for index in others)
        else:
            depends = torch.Tag.dynamic_output_shape in operator.tags
        if depends:
            msg = f"the shape of a result depends on the data, in {operator}"
            raise RuntimeError(msg)

    def node_of(self, tensor: Tensor) -> fx.Node:
        """Return where a tensor was made; one that was there before is a constant."""
        if tensor not in self._nodes:
            name = f"given_{len(self.constants._buffers)}"
            self.constants.register_buffer(name, tensor)
            node = self.graph.get_attr(name)
            self._fixed.add(node)
            self._note(tensor, node)
        return self._nodes[tensor]

    def _note(self, result: Any, node: fx.Node) -> None:
        """Remember where the tensors of a result come from."""
        if isinstance(result, Tensor):
            self._nodes[result] = node
            node.meta["made"] = Made(result.shape, result.stride(), result.dtype, result.device)
            return
        for i, part in enumerate(result or ()):
            if part is not None:
                one = self.graph.call_function(getitem, (node, i))
                if node in self._fixed:
                    self._fixed.add(one)
                self._note(part, one)


class _NoReading(TorchFunctionMode):
    """Refuses to hand out numbers in ways that are no operations: what is done with them nobody sees."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in ("numpy", "tolist", "__array__"):
            msg = f"a program reads the numbers in a tensor, by {name}()"
            raise RuntimeError(msg)
        return function(*args, **(kwargs or {}))
