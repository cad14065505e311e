"""A backend of torch.compile that runs graphs as they are and holds our ops to what the compiler was told.

Code that an inductor makes reads an op's results by the dtype and strides that its fake gave at tracing
time, whatever they are, and writes into memory that the graph needs no more, whoever still looks there; run
operation by operation, as `aot_eager` does, neither is seen.
"""

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils._pytree import tree_leaves


class _Checked(torch.fx.Interpreter):
    def __init__(self, graph):
        super().__init__(graph, garbage_collect_values=False)
        last_uses = {x: node for node in graph.graph.nodes for x in node.all_input_nodes}
        self._unused_after = {}
        for x, node in last_uses.items():
            self._unused_after.setdefault(node, []).append(x)

    def run(self, *args):
        self._given = {_memory(x) for x in args if isinstance(x, Tensor)}
        return super().run(*args)

    def run_node(self, n):
        result = super().run_node(n)
        if n.op == "get_attr":
            self._given.add(_memory(result))
        if getattr(n.target, "namespace", None) in ("graddot", "graddot_lm"):
            for got, told in zip(tree_leaves(result), tree_leaves(n.meta["val"]), strict=True):
                _check(n, got, told)
        if n.op != "output":
            self._overwrite([self.env.pop(x) for x in self._unused_after.get(n, [])], result)
        return result

    def _overwrite(self, unused, result):
        """What a compiler might write into memory that was the graph's own and that it needs no more."""
        needed = {0, *self._given, *map(_memory, tree_leaves([*self.env.values(), result]))}
        for x in tree_leaves(unused):
            if _memory(x) not in needed:
                kind = torch.uint8 if x.dtype == torch.bool else x.dtype
                whole = torch.empty(0, dtype=kind, device=x.device).set_(x.untyped_storage())
                whole.fill_(torch.nan if kind.is_floating_point else 1)


def _memory(x):
    return x.untyped_storage().data_ptr() if isinstance(x, Tensor) else 0


def _check(node, got, told):
    if not isinstance(told, Tensor):
        return
    for name in ("dtype", "device", "layout"):
        assert getattr(got, name) == getattr(told, name), (node.target, name, got, told)
    for name in ("shape", "stride"):
        sizes = [tuple(getattr(x, name)) if name == "shape" else x.stride() for x in (got, told)]
        assert len(sizes[0]) == len(sizes[1]), (node.target, name, got, told)
        for own, other in zip(*sizes, strict=True):  # those that vary are no numbers in the graph
            assert not isinstance(other, int) or own == other, (node.target, name, got, told)


def _run(graph, inputs):
    return make_boxed_func(_Checked(graph).run)


checked = aot_autograd(
    fw_compiler=_run,
    bw_compiler=_run,
    partition_fn=min_cut_rematerialization_partition,
    keep_inference_input_mutations=True,
)
