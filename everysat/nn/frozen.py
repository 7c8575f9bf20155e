"""A network for inputs of fixed shapes as one graph without branches, which other runtimes can take.

What a network decides by looking at its inputs (which patches were observed, how many dates each series has) is decided once, on an
example. Where a decision hangs on validity, the graph compares it with that of the example and answers NaN when it is another. What
does not depend on the inputs at all, such as indices and positions, is computed once and kept.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from everysat.types import ContractError

freezing: ContextVar[bool] = ContextVar("freezing", default=False)
"""Whether a graph is being made: shortcuts that look at numbers must then be left out."""
_DECIDING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_INDEXING = ("aten::index", "aten::index_put")
_IMAGES = {
    f"aten::{name}"
    for name in (
        "convolution", "native_batch_norm", "max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "upsample_bilinear2d",
        "upsample_bicubic2d", "upsample_nearest2d", "replication_pad2d", "reflection_pad2d", "_native_batch_norm_legit_no_training",
    )
}  # fmt: skip
"""Operators on a number of images, apart from each other, whose batches of batches PyTorch writes for one size alone."""
_LAST = {"aten::native_layer_norm", "aten::constant_pad_nd"}
"""Operators along the last axes, of which PyTorch says the same."""
_ALONG = {"aten::cat", "aten::index_copy", "aten::index_add", "aten::gather"}
"""Operators along one axis, of which PyTorch says the same."""
_IDENTICAL = ("aten::detach", "aten::alias", "aten::clone")
"""What gives its input, where nothing is changed in place."""


class Batched(nn.Module):
    """A graph of one sample, for batches of any size: every input and the output get a leading axis."""

    def __init__(self, one: fx.GraphModule) -> None:
        super().__init__()
        self.one = one

    def forward(self, *inputs: Tensor) -> Tensor:
        found: Tensor = _Samples(self.one).run(*inputs)
        return found


class _Samples(fx.Interpreter):
    """Runs a graph of one sample on a batch, node by node."""

    def __init__(self, one: fx.GraphModule) -> None:
        super().__init__(one)
        self.many: set[fx.Node] = set()
        """Nodes that differ between samples."""

    def run_node(self, n: Any) -> Any:
        many = [cause for cause in n.all_input_nodes if cause in self.many]
        if many or n.op == "placeholder":
            self.many.add(n)
        if not many or n.op == "output" or n.target is operator.getitem:
            return super().run_node(n)
        size = self.env[many[0]].shape[0]
        if _schema(n) in _IMAGES:  # their own axis of images takes the batch
            args: Any = self.map_nodes_to_values(n.args, n)
            image, *rest = args
            found = n.target(image.flatten(0, 1), *rest, **n.kwargs)
            parts = found if isinstance(found, tuple) else (found,)
            parts = tuple(part.unflatten(0, (size, -1)) if part.ndim > 1 else part for part in parts)
            return parts if isinstance(found, tuple) else parts[0]
        if _schema(n) in _LAST:
            return super().run_node(n)
        if _schema(n) in _ALONG:
            places = n.args[2] if _schema(n).startswith("aten::index_") else None  # the same of all samples
            own = {
                c: self.env[c].expand(size, *self.env[c].shape)
                for c in n.all_input_nodes
                if c not in self.many and c is not places
            }
            args = fx.map_arg((*n.args, 0)[: max(2, len(n.args))], lambda c: own[c] if c in own else self.env[c])
            first, axis, *rest = args
            return n.target(first, axis + (axis >= 0), *rest)
        if _schema(n) == "aten::index_put" and not any(index in self.many for index in n.args[1]):
            return self._put(n, size)

        def one(*tensors: Tensor) -> Any:
            own = dict(zip(many, tensors, strict=True))
            given: Any = fx.map_arg((n.args, n.kwargs), lambda node: own[node] if node in own else self.env[node])
            return n.target(*given[0], **given[1])

        return torch.func.vmap(one)(*(self.env[node] for node in many))

    def _put(self, n: Any, size: int) -> Tensor:
        args: Any = self.map_nodes_to_values(n.args, n)
        image, indices, values, *rest = args
        if n.args[0] not in self.many:
            image = image.expand(size, *image.shape)
        if n.args[2] in self.many and values.ndim > 1:
            given = [index for index in indices if index is not None]
            shape = max(index.ndim for index in given) + image.ndim - 1 - len(given)
            values = values.reshape(size, *(1,) * (shape - values.ndim + 1), *values.shape[1:])
        found: Tensor = n.target(image, [None, *indices], values, *rest)
        return found


def frozen(function: Callable[[dict[str, Tensor]], Tensor], example: Mapping[str, Tensor]) -> Batched:
    """``function`` of tensors by name as a module that takes them in order, each with a leading axis.

    Args:
        function: of one sample, without randomness.
        example: a sample. Bool tensors say what counts: what is decided by them, and by other yes-or-no questions, is decided as in the
            example, and where it would be otherwise the output is NaN.

    Raises:
        ContractError: what is done hangs on numbers of the input, such as the dates, or cannot be written as a graph.
    """
    names = list(example)

    def ordered(*tensors: Tensor) -> Tensor:
        with torch.no_grad():
            return function(dict(zip(names, tensors, strict=True)))

    from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize
    from torch.fx.experimental.proxy_tensor import make_fx

    tensors, told = [example[name] for name in names], freezing.set(True)
    single: Any = torch._decomp.get_decompositions(
        [torch.ops.aten.native_group_norm]
    )  # its kernel wants the number of samples
    options: dict[str, Any] = {"tracing_mode": "real", "_error_on_data_dependent_ops": False}
    try:
        ordered(*tensors)  # what the network keeps from call to call is kept now, as plain tensors
        with sdpa_kernel(SDPBackend.MATH):  # other kernels are known to PyTorch alone
            # With mutation taken out, a node has one value, and what is constant stays so.
            pure = dispatch_functionalize(ordered, FunctionalTensorMode())
            graph = make_fx(pure, decomposition_table=single, **options)(*tensors)
    except RuntimeError as error:  # of the tracer
        raise ContractError(
            f"the network cannot be written as one graph ({str(error).splitlines()[0][:200]}). Use the weights file itself"
        ) from error
    finally:
        freezing.reset(told)
    return Batched(_Folding(graph, tensors).folded())


class _Values(fx.Interpreter):
    """Runs a graph and keeps what each node gave."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.of: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.of[n] = super().run_node(n)
        return self.of[n]


class _Folding:
    def __init__(self, graph: fx.GraphModule, tensors: list[Tensor]) -> None:
        self.module, self.tensors = graph, tensors
        found = _Values(graph)
        with torch.no_grad():
            found.run(*tensors)
        self.value = found.of
        self.depends: dict[fx.Node, bool] = {}
        """Nodes that the inputs have a say in; true where numbers have, not only what is valid."""
        self.guards: dict[fx.Node, Tensor] = {}
        """What must be as in the example, for the graph to hold."""

    def folded(self) -> fx.GraphModule:
        graph = self.module.graph
        for node in graph.nodes:
            self._visit(node)
        for node in list(graph.nodes):
            self._settle(node)
        self._guard()
        graph.eliminate_dead_code()
        self.module.delete_all_unused_submodules()
        used = {node.target for node in graph.nodes if node.op == "get_attr"}
        for tensors in (self.module._parameters, self.module._buffers):  # constants hold what is needed of the others
            for name in [name for name in tensors if name not in used]:
                del tensors[name]
        self.module.recompile()
        return self.module

    def _visit(self, node: Any) -> None:
        if node.op == "placeholder":
            self.depends[node] = self.value[node].dtype != torch.bool
            return
        causes = [n for n in node.all_input_nodes if n in self.depends]
        if not causes:
            return
        if _deciding(node):
            for cause in causes:
                self._decide(node, cause)
            return
        if _schema(node) in _INDEXING:
            masks = {n for n in node.args[1] if n is not None and self._is(n, torch.bool)}
            for mask in masks:
                if mask in self.depends:
                    self._decide(node, mask)
            causes = [n for n in causes if n not in masks]
            if not causes:
                return
        self.depends[node] = any(self.depends[n] for n in causes)

    def _is(self, node: Any, dtype: torch.dtype) -> bool:
        value = self.value.get(node)
        return isinstance(value, Tensor) and value.dtype == dtype

    def _decide(self, node: fx.Node, cause: fx.Node) -> None:
        """The value of ``cause`` decides, at ``node``: it must be that of the example."""
        if self.depends[cause] and not self._is(cause, torch.bool):
            raise ContractError(
                f"the network looks at numbers of its input to decide what to do ({node.target}), which a graph for other "
                "runtimes cannot. Use the weights file itself"
            )
        self.guards[cause] = self.value[cause]

    def _settle(self, node: Any) -> None:
        """Constants become buffers, masks indices, and views copies where they must."""
        if node.op in ("placeholder", "output"):
            return
        if node not in self.depends:
            if isinstance(self.value[node], Tensor) and any(
                user in self.depends or user.op == "output" for user in node.users
            ):
                node.replace_all_uses_with(self._constant(self.value[node], node))
            return
        if _schema(node) in _INDEXING:
            self._index(node)
        elif node.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
            node.target = torch.ops.aten.reshape.default  # a batch may lie otherwise in memory
        elif _schema(node) in _IDENTICAL:
            node.replace_all_uses_with(node.args[0])

    def _constant(self, value: Tensor, before: fx.Node) -> fx.Node:
        name = f"constant_{len(self.module._buffers)}"
        self.module.register_buffer(name, value.detach().clone(memory_format=torch.contiguous_format))
        with self.module.graph.inserting_before(before):
            node = self.module.graph.get_attr(name)
        self.value[node] = value
        return node

    def _index(self, node: Any) -> None:
        picked: list[Any] = []
        for index in node.args[1]:
            value = self.value.get(index) if index is not None else None
            if value is not None and value.dtype == torch.bool:
                picked += [self._constant(axis, node) for axis in value.nonzero(as_tuple=True)]
            else:
                picked.append(index)
        node.args = (node.args[0], picked, *node.args[2:])

    def _guard(self) -> None:
        graph, aten = self.module.graph, torch.ops.aten
        end = next(node for node in graph.nodes if node.op == "output")
        result = end.args[0]
        with graph.inserting_before(end):
            fine: fx.Node | None = None
            for node, value in self.guards.items():
                same = node if bool(value.all()) and value.dtype == torch.bool else graph.call_function(
                    aten.eq.Tensor, (node, self._constant(value, end))
                )  # fmt: skip
                each = graph.call_function(aten.all.default, (same,))
                fine = each if fine is None else graph.call_function(aten.logical_and.default, (fine, each))
            if fine is not None:
                nothing = self._constant(torch.tensor(math.nan), end)
                end.args = (graph.call_function(aten.where.self, (fine, result, nothing)),)


def _schema(node: fx.Node) -> str:
    return node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else ""


def _deciding(node: fx.Node) -> bool:
    """Whether the shape of what a node gives, or what Python does next, hangs on its input."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem:
        return False
    return _schema(node) not in _INDEXING and bool(_DECIDING & set(node.target.tags))
