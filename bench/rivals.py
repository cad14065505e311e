"""Other ways to the same scores, for the benchmarks: each gives the dots and leaves `.grad`.

They serve a GPT-2 with untied weights, whose loss is the mean over all tokens. What each leaves out
is said with it; none is tuned beyond what its authors do.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from graddot_kernels import (
    embedding_direction_dot,
    embedding_ghost_dot,
    linear_direction_dot,
    linear_ghost_dot,
)

Batch = tuple[Tensor, Tensor]
Loss = Callable[[Any, Tensor, Tensor], Tensor]


class Capture:
    """What hooks see of one layer: its input and the gradient at its output."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.rows = 0
        self.input: Tensor | None = None
        self.grad: Tensor | None = None

    def forward_hook(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Position ids come once for all rows; their gradient must not be summed over rows."""
        self.input = args[0].detach().expand(self.rows, *args[0].shape[1:])
        output = output.expand(self.rows, *output.shape[1:])
        output.register_hook(self._keep)
        return output

    def _keep(self, grad: Tensor) -> None:
        self.grad = grad

    def of(self, rows: slice) -> tuple[Tensor, Tensor]:
        assert self.input is not None and self.grad is not None
        return self.input[rows], self.grad[rows]

    def vectors(self, rows: slice) -> Tensor:
        """Per-sample gradients of bias and norm weights, side by side, (rows, d)."""
        x, grad = self.of(rows)
        parts = []
        if isinstance(self.module, nn.LayerNorm):
            normed = nn.functional.layer_norm(x, self.module.normalized_shape)
            parts.append((grad * normed).sum(1))
        if getattr(self.module, "bias", None) is not None:
            parts.append(grad.sum(1))
        return torch.cat(parts, 1) if parts else grad.new_zeros(grad.shape[0], 0)


@contextmanager
def captured(model: nn.Module) -> Iterator[list[Capture]]:
    kinds = (nn.Linear, Conv1D, nn.Embedding, nn.LayerNorm)

    def count_rows(module: nn.Module, args: Any) -> None:
        for c in captures:
            c.rows = len(args[0])

    captures = [Capture(m) for m in model.modules() if isinstance(m, kinds)]
    hooks = [model.register_forward_pre_hook(count_rows)]
    hooks += [c.module.register_forward_hook(c.forward_hook) for c in captures]
    try:
        yield captures
    finally:
        for hook in hooks:
            hook.remove()


def naive(model: nn.Module, loss: Loss, train: Batch, val: Batch) -> Tensor:
    """One backward a sample."""
    parameters = list(model.parameters())
    directions = torch.autograd.grad(loss(model, *val), parameters)
    n = len(train[0])
    dots = torch.zeros(n, dtype=torch.float64, device=train[0].device)
    for i in range(n):
        grads = torch.autograd.grad(
            loss(model, train[0][i : i + 1], train[1][i : i + 1]), parameters
        )
        for p, g, d in zip(parameters, grads, directions, strict=True):
            dots[i] += torch.dot(g.flatten(), d.flatten())
            p.grad = g / n if i == 0 else p.grad.add_(g, alpha=1 / n)
    return dots


def two_matmuls(model: nn.Module, loss: Loss, train: Batch, val: Batch) -> Tensor:
    """Joint backward with hooks, then token-by-token products for every pair of rows, as the ghost
    dot product was first published. `.grad` is that of the joint batch."""
    n, v = len(train[0]), len(val[0])
    x, y = torch.cat([train[0], val[0]]), torch.cat([train[1], val[1]])
    dots = torch.zeros(n, dtype=torch.float64, device=train[0].device)
    with captured(model) as captures:
        loss(model, x, y).backward()
    t_rows, v_rows = slice(0, n), slice(n, n + v)
    for c in captures:
        (act, grad), (val_act, val_grad) = c.of(t_rows), c.of(v_rows)
        if isinstance(c.module, nn.Embedding):
            vocab = c.module.num_embeddings
            dots += embedding_ghost_dot(val_act, val_grad, act, grad, vocab)
            continue
        if not isinstance(c.module, nn.LayerNorm):
            dots += linear_ghost_dot(val_act, val_grad, act, grad, method="gram")
        dots += c.vectors(t_rows) @ c.vectors(v_rows).sum(0)
    return dots * (n + v) ** 2 / v


def cached_direction(model: nn.Module, loss: Loss, train: Batch, val: Batch) -> Tensor:
    """A val backward of its own, then a product with its gradient behind every layer."""
    n = len(train[0])
    with captured(model) as captures:
        loss(model, *val).backward()
        val_vectors = [c.vectors(slice(None)).sum(0) for c in captures]
        directions = [c.module.weight.grad for c in captures]
        model.zero_grad(set_to_none=True)
        loss(model, *train).backward()
        dots = torch.zeros(n, dtype=torch.float64, device=train[0].device)
        for c, direction, vector in zip(captures, directions, val_vectors, strict=True):
            act, grad = c.of(slice(None))
            if isinstance(c.module, nn.Embedding):
                dots += embedding_direction_dot(direction, act, grad)
                continue
            if not isinstance(c.module, nn.LayerNorm):
                side = direction.t() if isinstance(c.module, Conv1D) else direction
                dots += linear_direction_dot(side.contiguous(), act, grad)
            dots += c.vectors(slice(None)) @ vector
    return dots * n


def vmap_grad(model: nn.Module, loss: Loss, train: Batch, val: Batch) -> Tensor:
    """torch.func: per-sample gradients of all samples at once, in memory."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def one(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, values, (x[None],)).logits[0, :-1]
        return nn.functional.cross_entropy(logits, y[1:])

    loss(model, *val).backward()
    directions = {name: p.grad for name, p in model.named_parameters()}
    grads = torch.func.vmap(torch.func.grad(one), (None, 0, 0))(parameters, *train)
    dots = torch.zeros(len(train[0]), dtype=torch.float64, device=train[0].device)
    for name, p in model.named_parameters():
        dots += grads[name].flatten(1) @ directions[name].flatten()
        p.grad = grads[name].mean(0)
    return dots


def opacus_samples(sampled: Any, loss: Loss, train: Batch, val: Batch) -> Tensor:
    """Opacus' per-sample gradients of all samples at once, in memory; `sampled` is its wrapper.

    Position ids are given for every row: with GPT-2's own, one row for all, it has no per-sample
    gradient of the position embedding.
    """
    n = len(train[0])
    x, y = torch.cat([train[0], val[0]]), torch.cat([train[1], val[1]])
    positions = torch.arange(x.shape[1], device=x.device).expand_as(x)

    def with_positions(rows: Tensor) -> Any:
        return sampled(rows, position_ids=positions)

    loss(with_positions, x, y).backward()
    dots = torch.zeros(n, dtype=torch.float64, device=train[0].device)
    for p in sampled.parameters():
        samples = p.grad_sample.flatten(1)
        dots += samples[:n] @ samples[n:].mean(0)
        p.grad, p.grad_sample = p.grad_sample[:n].mean(0), None
    return dots
