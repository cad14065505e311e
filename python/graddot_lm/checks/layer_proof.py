"""Proof of a layer's rule: scored in one batch against autograd, one sample at a time, float64."""

import contextlib
import copy
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only

from ..errors import GraddotError
from ..rules.general import NoRows, Rule, Tokens, caller_rule
from ..rules.mixtures import Mixture
from ..rules.table import rule_for
from ..scored import Scored, ScoredForward, first_tensor
from ..step import Step
from .copies import exact_copy
from .digests import NoDropout, own_buffers, own_random, uncached
from .parts import take_rows
from .rows import Layout, find_layouts
from .verify import foreign_uses, tensors_in

WayType = TypeVar("WayType", bound=Rule)
TOLERANCE = 1e-5  # of the norm: many layers compute in fp32 whatever their input is
LARGE = 2**24  # parameters of a layer whose proof is announced
_log = logging.getLogger(__name__)


def check_layer(module: nn.Module, *inputs: Any, **kwargs: Any) -> None:
    """Prove that a layer, or a whole model, is scored exactly on the given input.

    Every tensor among the inputs has the samples, at least two, as its first dimension, or is the
    same for all of them; the last sample is taken for the validation row. In float64, with dropout
    off, these are compared with autograd on the layer's own forward, one sample at a time: the
    output, the gradient of every floating-point input, every parameter's training gradient, and
    the dot product of every parameter's gradient with every sample's. The module is not changed.

    Raises GraddotError naming the first thing that differs by more than 1e-5 of its norm.
    """
    first = first_tensor(inputs, kwargs)
    if first is None or first.dim() == 0 or first.shape[0] < 2:
        raise GraddotError("check_layer needs an input tensor with at least two samples")
    plain = copy.deepcopy(module)
    inner = {name: m for name, m in plain.named_modules() if name and rule_for(m) is not None}
    layouts = find_layouts(plain, inner, inputs, kwargs, first.shape[0])
    layouts[""] = "rows"
    proof = functools.partial(_Proof, module, "", first.shape[0], layouts, rule_for(module))
    _run_proof(proof, inputs, kwargs)


def prove(
    module: nn.Module,
    scored: Scored,
    make: Callable[[], WayType],
    args: Any,
    kwargs: Any,
    *,
    skip: int = 0,
) -> WayType:
    """check_layer of a rule that `make` makes, on a few rows of what a layer got in a step; returns
    the rule. The number of rows is none that a dimension of the layer may be taken for; skip leaves
    out the first such numbers."""
    rows = scored.rows
    error: GraddotError | None = None
    counts = _unlike(module, scored, args, kwargs)
    tried = counts[skip : skip + 2] or counts[-1:]
    if (size := sum(p.numel() for p in module.parameters())) > LARGE:
        _log.warning(
            "layer %s of type %s, of %.0f million parameters, is proven now, once, on %d rows in float64, which"
            " may take as long as many steps (docs/guide.md, Models)",
            scored.name or "(itself)", type(module).__name__, size / 1e6, tried[0],
        )  # fmt: skip
    for count in tried:
        few = [i % rows for i in range(count - 1)] + [rows - 1]
        try:
            return _prove_on(module, scored, make, few, args, kwargs)
        except GraddotError as failed:
            error = error or failed.with_traceback(None)  # which would keep the copies
    assert error is not None
    raise error


def check_by_token(module: nn.Module, name: str, tokens: Tokens, args: Any, kwargs: Any) -> None:
    """Raise GraddotError unless a layer does with the tokens of a row, each a row of its own, what it
    does with the row."""
    plain = exact_copy(module)
    exact = lambda x: x.detach().double() if x.is_floating_point() else x.detach().clone()
    args, kwargs = tree_map_only(Tensor, exact, (args, kwargs))
    with _exactly(), torch.no_grad():
        want = list(tensors_in(plain(*args, **kwargs)))
        own_args, own_kwargs = tokens.as_rows((args, kwargs))
        try:
            got = list(tensors_in(tokens.as_one(plain(*own_args, **own_kwargs))))
        except Exception:  # noqa: BLE001 - the layer's own code may raise anything
            got = []
    same = len(got) == len(want) and all(
        x.shape == y.shape and (x - y).abs().max() <= TOLERANCE * y.abs().max()
        for x, y in zip(got, want, strict=True)
    )
    if not same:
        raise GraddotError(
            f"layer {name} of type {type(module).__name__} has parameters of its own, and does not look"
            " at each token by itself, so that it cannot be scored for the samples of a packed row; give"
            " every sample a row of its own, or freeze them"
        )


def _prove_on(
    module: nn.Module,
    scored: Scored,
    make: Callable[[], WayType],
    index: list[int],
    args: Any,
    kwargs: Any,
) -> WayType:
    is_several = [any(x is one for one in scored.several) for x in tree_leaves((args, kwargs))]
    several = [i for i, x in enumerate(is_several) if x]

    def proof(rule: Rule, index: list[int], **options: Any) -> None:
        def few(x: Tensor) -> Tensor:
            x, has_rows = x.detach(), scored.has_rows(x)
            return take_rows(x, index, scored.rows, [len(x) // scored.rows]) if has_rows else x

        inputs = tree_map_only(Tensor, few, (args, kwargs))
        step = scored.step
        known = functools.partial(
            _Proof, module, scored.name, len(index), step.layouts, rule,
            several=several, originals=step.names,
        )  # fmt: skip
        _run_proof(known, *inputs, **options)

    rule = make()
    with contextlib.suppress(_UnevenNumber):
        proof(rule, index)
        return rule
    # Rows that are all the same weigh the same, whatever a loss's labels: that is for the
    # number, and the distinct rows are for what else is returned.
    rule = make()
    proof(rule, index, numbers=False)
    proof(make(), index[-1:] * len(index))
    return rule


def _run_proof(proof: Callable[..., "_Proof"], args: Any, kwargs: Any, **options: Any) -> None:
    try:
        proof().run(args, kwargs, **options)
    except _OtherDtype:
        proof(in_double=True).run(args, kwargs, **options)


def _unlike(module: nn.Module, scored: Scored, args: Any, kwargs: Any) -> list[int]:
    """Small primes that divide no dimension of the layer's parameters, buffers and inputs."""
    tensors = [*module.parameters(), *module.buffers()]
    sizes = {size for x in tensors for size in x.shape}
    for x in tree_flatten((args, kwargs))[0]:
        if isinstance(x, Tensor):
            has_rows = scored.has_rows(x)
            sizes |= {len(x) // scored.rows, *x.shape[1:]} if has_rows else {*x.shape}
    sizes |= {scored.step.row_tokens(scored.name)} | {size + 1 for size in sizes}
    primes = [3, 5, 7, 11, 13, 17, 19, 23]
    return [p for p in primes if all(size == 0 or size % p for size in sizes)] or primes[-1:]


class _OtherDtype(GraddotError):
    """A layer does not run in float64, as one that multiplies x.float() by a weight in fp32."""


class _UnevenNumber(GraddotError):
    """A number that a layer returns is neither the mean nor the sum of its rows' own."""


class _Proof:
    """One module's run with its rule and its runs without, in float64 copies."""

    def __init__(
        self,
        module: nn.Module,
        name: str,
        rows: int,
        layouts: Mapping[str, Layout],
        rule: Rule | None,
        *,
        several: Sequence[int] = (),
        originals: Mapping[int, str] | None = None,
        in_double: bool = False,
    ) -> None:
        """several: which of the inputs hold several entries of each row; originals: the names of the
        model's parameters by id."""
        self._originals = {**(originals or {}), **{id(p): n for n, p in module.named_parameters()}}
        self._scored, self._plain = exact_copy(module), exact_copy(module)
        for p, own in zip(self._plain.parameters(), self._scored.parameters(), strict=True):
            own.data = p.data  # with a .grad each
        for copied in (self._scored, self._plain):
            copied._forward_hooks.clear()  # which may collect what the layer returns in a step
            copied._forward_pre_hooks.clear()
        self._name, self._rows, self._input_gradients = name, rows, True
        in_double |= isinstance(rule, Mixture)
        self._in_double = _InDouble() if in_double else contextlib.nullcontext()
        parameters = {n: p for n, p in self._scored.named_parameters() if p.requires_grad}
        device = next(self._scored.parameters()).device
        scale = torch.ones((), dtype=torch.float64, device=device)
        names = {id(p): n for n, p in parameters.items()}
        self._step = Step(rows, [1], scale, names, names, layouts=dict(layouts))
        self._several, self._entries = several, {self._step.row_tokens(name)}
        # Layers that a model's engine follows beyond those that need it are followed here, too, and
        # those that it leaves to the ones around have no rule here.
        attached = {
            key
            for key, part in module.named_modules()
            if isinstance(part.__dict__.get("forward"), ScoredForward)
        }

        def of_several(module: nn.Module, scored: Scored, *args: Any, **kwargs: Any) -> Any:
            assert rule is not None
            scored.several = [tree_leaves((args, kwargs))[i] for i in several]
            return rule(module, scored, *args, **kwargs)

        def rule_of(key: str, part: nn.Module) -> Rule | None:
            if part is self._scored:
                return of_several if several else rule
            if "" in attached and key not in attached:
                return None
            return rule_for(part) or (caller_rule() if key in attached else None)

        self._rules = {key: rule_of(key, part) for key, part in self._scored.named_modules()}

    @contextlib.contextmanager
    def _scored_forwards(self) -> Iterator[None]:
        """The copy's layers scored; not any longer, for a layer and its scored forward know of each
        other, a cycle that would keep the copy and its graph until Python looks for such."""
        step, parts = self._step, []
        for key, rule in self._rules.items():
            if rule is not None:
                part = self._scored.get_submodule(key)
                full = ".".join(filter(None, (self._name, key)))
                part.forward = ScoredForward(part, full, rule, lambda *_: step)
                part.forward.graddot_head = lambda *_: step  # type: ignore[attr-defined]
                parts.append(part)
        try:
            yield
        finally:
            for part in parts:
                del part.__dict__["forward"]

    def run(self, args: Any, kwargs: Any, *, numbers: bool = True) -> None:
        """Once. numbers: of outputs without dimensions, too, each the mean or the sum of its rows' own."""
        try:
            self._run(args, kwargs, numbers)
        finally:
            for copied in (self._scored, self._plain):
                for part in copied.modules():
                    part.__dict__.pop("forward", None)  # a method of its own: a cycle

    def _run(self, args: Any, kwargs: Any, numbers: bool) -> None:
        exact = lambda part: copy.deepcopy(part).double()
        args, kwargs = tree_map_only(nn.Module, exact, (args, kwargs))
        leaves = tree_leaves((args, kwargs))
        self._entries |= {len(leaves[i]) // self._rows for i in self._several}
        arguments = args, kwargs
        # One graph at a time: in float64 it may be most of what there is.
        with _exactly(), self._in_double, self._scored_forwards():
            joint_out = self._call(self._plain, arguments, numbers)[1]
            self._check_copied(joint_out)
            joint_out = [self._with_rows(x) for x in joint_out]
            weights = _weights(joint_out)
            joint_out = self._backward(joint_out, weights)
            joint = _gradients(self._plain)
            scored_in, scored_out = self._call(self._scored, arguments, numbers)
            scored_out = [self._with_rows(x) for x in scored_out]
            self._compare_shapes(scored_out, joint_out)
            scored_out = self._backward(scored_out, weights)
            self._step.dot_held_rows()
            samples = _Samples(_gradients(self._scored), joint)
            parts = self._parts(arguments, joint_out)
            for k, x in enumerate(joint_out):
                if not x.dim():
                    self._close(f"output {k}", scored_out[k], x)
            # The val row first, with which all others are dotted.
            for i in reversed(range(self._rows)):
                self._plain.zero_grad(set_to_none=True)
                inputs, out = self._call(self._plain, self._alone(arguments, i), numbers)
                own = lambda x, i=i: take_rows(x, [i], self._rows, [len(x) // self._rows])
                for k, x in enumerate(out):
                    if x.dim():
                        self._close(f"output {k} of sample {i} alone and", x, own(joint_out[k]))
                        self._close(f"output {k} of sample {i}", own(scored_out[k]), x)
                self._backward(
                    out, [own(w) if w.dim() else w * p for w, p in zip(weights, parts, strict=True)]
                )
                samples.add(_gradients(self._plain))
                for k, (x, whole) in enumerate(zip(inputs, scored_in, strict=True)):
                    if x.grad is not None and whole.shape != x.shape:
                        got = torch.zeros_like(x) if whole.grad is None else whole.grad
                        got = self._alone(got, i)
                        self._close(f"gradient of input {k}, sample {i},", got, x.grad)
            self._compare_gradients(samples)

    def _alone(self, values: Any, i: int) -> Any:
        """Row i of all tensors that have rows."""
        one = lambda x: take_rows(x, [i], self._rows, self._entries)
        return tree_map_only(Tensor, one, values)

    def _parts(self, arguments: Any, joint: list[Tensor]) -> list[float]:
        """By what a sample's own outputs enter the joint ones: 1, or of a number a mean's 1 / rows."""
        if all(x.dim() for x in joint):
            return [1.0] * len(joint)
        totals = [torch.zeros_like(x) for x in joint]
        for i in range(self._rows):
            _, out = self._call(self._plain, self._alone(arguments, i), True)
            for total, x in zip(totals, out, strict=True):
                if not x.dim():
                    total += x.detach()
        return [
            self._part(k, x, total) for k, (x, total) in enumerate(zip(joint, totals, strict=True))
        ]

    def _check_copied(self, outputs: list[Tensor]) -> None:
        """Raise GraddotError if the copy uses the model's parameters, of which nothing would be proven: the
        backward would add to their .grad."""
        if uses := foreign_uses(outputs, self._originals):
            raise GraddotError(
                f"{self._title()}: a copy of it uses {', '.join(sorted(uses))} of the model itself, by a"
                " function that it keeps; make that a method, or keep in it what it uses"
            )

    def _part(self, k: int, joint: Tensor, total: Tensor) -> float:
        if joint.dim():
            return 1.0
        for part in (1 / self._rows, 1.0):
            if torch.allclose(joint, part * total, rtol=TOLERANCE, atol=0):
                return part
        raise _UnevenNumber(
            f"{self._title()}: output {k}, a number, is {float(joint):.6g}, which is neither the mean"
            f" nor the sum, {float(total):.6g}, of what it is for its {self._rows} rows alone"
        )

    def _with_rows(self, x: Tensor) -> Tensor:
        """An output (1, ...) that is broadcast over the rows, as a scored layer gives it."""
        return x.expand(self._rows, *x.shape[1:]) if x.shape[:1] == (1,) else x

    def _call(
        self, module: nn.Module, arguments: Any, numbers: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Floating-point inputs as leaves, and the outputs that depend on anything; of those without
        dimensions the ones that have a gradient, if any."""

        leaves: list[Tensor] = []

        def leaf(x: Tensor) -> Tensor:
            x = x.detach().clone()
            if not x.is_floating_point():
                return x
            leaves.append(x.double().requires_grad_(self._input_gradients))
            return leaves[-1] * 1  # to a leaf no model could write

        try:
            args, kwargs = tree_map(
                lambda x: leaf(x) if isinstance(x, Tensor) else _own(x), arguments
            )
            with own_buffers(module):
                out = module(*args, **kwargs)
        except GraddotError:
            raise
        except Exception as error:  # whatever the layer's own code raises is the reason
            if self._input_gradients and "requires_grad flags of leaf variables" in str(error):
                # It asks for a gradient of its input, as wav2vec 2 does, which a step gives none.
                self._input_gradients = False
                return self._call(module, arguments, numbers)
            of_dtype = "dtype" in str(error) or "scalar type" in str(error)
            raise (_OtherDtype if of_dtype else GraddotError)(self._reason(error)) from error
        outputs = list(tensors_in(out))
        if not outputs and out is not None:
            raise GraddotError(
                f"{self._title()}: returned a {type(out).__name__}, in which no tensor was found"
            )
        return (
            leaves,
            [
                x
                for x in outputs
                if x.is_floating_point() and (x.dim() or numbers and x.requires_grad)
            ],
        )

    def _backward(self, outputs: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
        """The outputs without their graph."""
        used = [(x * w).sum() for x, w in zip(outputs, weights, strict=True) if x.requires_grad]
        try:
            if used:
                torch.stack(used).sum().backward()
        except GraddotError:
            raise
        except Exception as error:  # as above
            raise GraddotError(f"its backward: {self._reason(error)}") from error
        return [x.detach() for x in outputs]

    def _compare_shapes(self, scored: list[Tensor], joint: list[Tensor]) -> None:
        got, want = [tuple(x.shape) for x in scored], [tuple(x.shape) for x in joint]
        if got != want:
            raise GraddotError(
                f"{self._title()}: outputs of shapes {got}; its forward's are {want}"
            )
        for shape in want:
            if shape and shape[0] % self._rows:
                message = f"{self._title()}: an output of shape {shape} has no rows"
                raise NoRows(message, self._name)

    def _compare_gradients(self, samples: "_Samples") -> None:
        """Of all rows in one batch an autograd function may not make the sum of each one's own, as one that
        divides a weight's by the number of tokens."""
        largest = lambda norms: max(norms, default=0.0)
        # Some gradients are zero but for rounding.
        floor = 1e-2 * largest(samples.train_norms.values())
        small = 1e-4 * largest(samples.val_norms.values())
        of_samples = [small * largest(norm for _, norm in x.values()) for x in samples.train]
        train_off = samples.train_off()
        for n in samples.val_norms:
            what = f"training gradient of {n}"
            self._small(what, train_off[n], samples.train_norms[n], floor)
            what = f"sum over samples of the gradient of {n}"
            self._small(what, samples.joint_off[n], samples.joint_norms[n], floor)
            dots = self._step.collected(n)
            if dots is None:
                dots = next(self._scored.parameters()).new_zeros(1, len(samples.train))
            for i, sample in enumerate(samples.train):
                want, norm = sample[n]
                size = max(samples.val_norms[n] * norm, of_samples[i])
                self._close(f"dot product of {n} with sample {i}", dots[0, i], want, size)

    def _close(self, what: str, got: Tensor, want: Tensor, floor: float = 0.0) -> None:
        got, want = got.detach().double(), want.detach().double()
        if got.shape != want.shape:
            raise GraddotError(
                f"{self._title()}: the {what} has shape {tuple(got.shape)}; autograd's has"
                f" {tuple(want.shape)}"
            )
        if got.isinf().any():
            infinite = got.isinf() & (got == want)  # as logits of what is masked
            got, want = got.masked_fill(infinite, 0), want.masked_fill(infinite, 0)
        self._small(what, (got - want).norm().item(), want.norm().item(), floor)

    def _small(self, what: str, error: float, norm: float, floor: float = 0.0) -> None:
        """The norm of a difference against that of what is right."""
        error /= max(norm, floor, 1e-30)
        if not error <= TOLERANCE:
            other = "in the batch differ" if what.endswith("and") else "differs from autograd's"
            raise GraddotError(f"{self._title()}: the {what} {other} by {error:.1e} of its norm")

    def _reason(self, error: Exception) -> str:
        """Its first line; of memory what to do."""
        message = str(error).strip().splitlines() or [""]
        reason = f"{type(error).__name__}: {message[0]}"
        memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if memory or "can't allocate memory" in reason:
            reason += (
                f". It is proven on {self._rows} rows in float64, which takes more memory than there is: run"
                " a batch of shorter rows first, for what is proven holds for any length; or, where it holds"
                " many layers, put its own parameters into a small module beside them"
            )
        return reason

    def _title(self) -> str:
        kind = type(self._plain).__name__
        return f"layer {self._name} ({kind})" if self._name else kind


class _Samples:
    """Gradients of one sample after the other, the val row's first, by parameter: of a training row its dot
    with that, and norm. They are taken away from the training gradient of the rule and from that of all
    rows in one batch, of which norms are left, and of what is left of them; so no sum of samples is held."""

    def __init__(self, training: dict[str, Tensor], joint: dict[str, Tensor]) -> None:
        """Which are written to."""
        self._training, self._val = training, dict[str, Tensor]()
        self.train_norms, self.joint_norms = _norms(training), _norms(joint)
        self._joint = {n: joint[n].sub_(g) for n, g in training.items()}  # the val row's
        self.val_norms: dict[str, float] = {}
        self.joint_off: dict[str, float] = {}
        self.train: list[dict[str, tuple[Tensor, float]]] = []

    def add(self, grads: dict[str, Tensor]) -> None:
        """Take the next one's, in the order from the last training row to the first."""
        if not self.val_norms:
            self._val, self.val_norms = grads, _norms(grads)
            self.joint_off = {n: self._joint.pop(n).sub_(g).norm().item() for n, g in grads.items()}
            return
        norms = _norms(grads)
        flat = lambda x: x.reshape(-1)
        dots = {n: torch.dot(flat(self._val[n]), flat(g)) for n, g in grads.items()}
        self.train.insert(0, {n: (dots[n], norms[n]) for n in grads})
        for n, g in grads.items():
            self._training[n] -= g

    def train_off(self) -> dict[str, float]:
        return _norms(self._training)


def _weights(outputs: list[Tensor]) -> list[Tensor]:
    """Of a loss that is their sum with these."""
    generator = torch.Generator().manual_seed(0)
    drawn = [
        torch.randn(x.shape, generator=generator, dtype=torch.float64, device="cpu")
        for x in outputs
    ]
    return [w.to(x.device) for w, x in zip(drawn, outputs, strict=True)]


def _norms(grads: dict[str, Tensor]) -> dict[str, float]:
    return {n: g.norm().item() for n, g in grads.items()}


def _own(x: Any) -> Any:
    """A copy of an argument that a call may write to; in training, an empty cache is none."""
    if isinstance(x, nn.Module):
        return x
    return None if hasattr(x, "get_seq_length") else copy.deepcopy(x)


def _gradients(module: nn.Module) -> dict[str, Tensor]:
    """Of every trainable parameter; zeros where none came, as for an expert without tokens."""
    trainable = {n: p for n, p in module.named_parameters() if p.requires_grad}
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trainable.items()}


class _InDouble(TorchFunctionMode):
    """Casts to float32 are to float64: layers that compute in float32 with weights that are kept in it,
    and mixtures that add up in it what experts return, would not run in float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        args, kwargs = self._double(args), self._double(kwargs or {})
        return (Tensor.double if func is Tensor.float else func)(*args, **kwargs)

    def _double(self, x: Any) -> Any:
        """tree_map_only in a quarter of its time, which was a third of a mixture's proof."""
        if x is torch.float32:
            return torch.float64
        if type(x) in (list, tuple):
            return type(x)(map(self._double, x))
        return {k: self._double(v) for k, v in x.items()} if type(x) is dict else x


@contextlib.contextmanager
def _exactly() -> Iterator[None]:
    """Gradients on, autocast and dropout off, and the random state left as it was.

    Tensors are saved as they are: activation checkpointing around must neither see nor rerun this. But
    detached: an output that its own node saves would keep a graph of which no backward runs for good.
    """
    as_it_is = torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda x: x)
    with contextlib.ExitStack() as stack:
        stack.enter_context(as_it_is)
        stack.enter_context(own_random())
        stack.enter_context(uncached())
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(NoDropout())
        yield
