"""norms=True against brute force: norms of every sample and target, cosines, columns, refusals."""

import copy

import pytest
import torch
import torch.nn.functional as F
from brute_force import gradient, lm_loss, norm, sample_dots, tiny_gpt2, token_batch, total
from engine_steps import MLP, TOLERANCE, SharedEverything, run_step
from graddot_lm import GraddotError, GradDotProdEngine, fuse_head
from graddot_lm.rules import convolutions, transformers_layers
from loop_steps import Store, attached, run
from process_group import on_processes
from test_models import LANGUAGE_MODELS, VOCAB
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from graddot_kernels import fused_head

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])


def sample_norms(model, train, loss=lm_loss):
    x, y = train
    rows = [(x[i : i + 1], y[i : i + 1]) for i in range(len(x))]
    return torch.stack([norm(gradient(model, *row, loss=loss)) for row in rows])


def check_norms(close, engine, model, train, vals, tolerance, *, loss=lm_loss):
    """Norms and cosines of a step; vals a list of targets' batches. Cosines are held to absolute
    errors: 1 is their Cauchy-Schwarz scale."""
    samples = sample_norms(model, train, loss)
    targets = torch.stack([norm(gradient(model, *val, loss=loss)) for val in vals])
    dots = torch.stack([total(sample_dots(model, train, val, loss=loss)[0]) for val in vals])
    close(engine.gradient_norms(), samples, tolerance)
    close(torch.atleast_1d(engine.target_norms()), targets, tolerance)
    cosines = dots / (targets[:, None] * samples)
    close(torch.atleast_2d(engine.cosines()), cosines, tolerance, torch.full_like(cosines, 10))


def check_step(
    close, model, train, val, dtype, *, loss=lm_loss, label_shift=1, factor=1.0, tolerance=None
):
    """A step with riding rows, and one with given directions; the scores and gradients are those
    without norms. factor is a loss scale."""
    exact, tolerance = model, tolerance or TOLERANCE[dtype]
    model = copy.deepcopy(model).to(dtype)
    if train[0].is_floating_point():
        train, val = (train[0].to(dtype), train[1]), (val[0].to(dtype), val[1])
    args = {"loss": loss, "label_shift": label_shift, "factor": factor}
    plain, plain_dots = run_step(model, train, val, **args)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = {n: p.grad.clone() for n, p in trained.items()}
    engine = attached(model, val, norms=True, per_parameter=True, label_shift=label_shift)
    model.zero_grad(set_to_none=True)
    run(engine, train, loss=loss, factor=factor)
    check_norms(close, engine, exact, train, [val], tolerance, loss=loss)
    for name, dots in engine.parameter_dots().items():
        assert (dots - plain_dots[name]).norm() <= 1e-6 * plain_dots[name].norm(), name
    close(engine.aggregate_and_log(), plain, tolerance)
    assert all(torch.equal(p.grad, grads[n]) for n, p in trained.items())
    check_norms(close, engine, exact, train, [val], tolerance, loss=loss)  # they are still there
    engine.detach()
    engine = attached(model, norms=True, label_shift=label_shift)
    of_output = lambda m, x, y: loss(getattr(out := m(x), "logits", out), y)
    engine.set_directions(engine.compute_directions([val], of_output))
    run(engine, train, loss=loss, factor=factor)
    check_norms(close, engine, exact, train, [val], 2 * tolerance, loss=loss)
    engine.detach()


@DTYPES
@pytest.mark.parametrize("v", [1, 3])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_gpt2(close, tied, v, dtype):
    train, val = token_batch(4, 17, seed=1, ragged=True), token_batch(v, 17, seed=2, ragged=True)
    check_step(close, tiny_gpt2(tied=tied), train, val, dtype, factor=1.0 if v == 1 else 4096.0)


@DTYPES
@pytest.mark.parametrize("compiled", [True, False])
def test_long_samples(close, dtype, compiled, monkeypatch):
    """The fused route of every linear layer, with compiled kernels and without."""
    if not compiled:
        monkeypatch.setattr("graddot_kernels.cpu_kernels.INSTRUCTION_SET", "")
    monkeypatch.setattr("graddot_kernels.torch_impl._MACS_PER_FUSED_ELEMENT", 1)
    monkeypatch.setattr("graddot_kernels.torch_impl._MACS_PER_FUSED_ELEMENT_COMPILED", 1)
    check_step(close, tiny_gpt2(), token_batch(3, 31, seed=1), token_batch(2, 31, seed=2), dtype)


@DTYPES
@pytest.mark.parametrize("make", [MLP, SharedEverything])
def test_short_samples_and_several_uses(close, make, dtype):
    """T = 1; a weight of two embeddings with padding and a head, a layer and a norm used twice."""
    if make is SharedEverything:
        train, val = token_batch(5, 11, 30, seed=6), token_batch(2, 11, 30, seed=7)
        assert (train[0] == 3).any() and (val[0] == 3).any(), "padding ids must occur"
        check_step(close, make(), train, val, dtype)
        return
    g = torch.Generator().manual_seed(5)
    x, y = torch.randn(8, 12, generator=g), torch.randint(0, 7, (8,), generator=g)
    check_step(
        close,
        make(True),
        (x[:6], y[:6]),
        (x[6:], y[6:]),
        dtype,
        loss=F.cross_entropy,
        label_shift=0,
    )


class ConvNet(nn.Module):
    """Convolutions, one grouped (the general rule), a group norm, and a parameter of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(2, 6, 3, stride=2), nn.Conv2d(6, 6, 3, groups=2)
        self.norm, self.line = nn.GroupNorm(2, 6), nn.Conv1d(6, 4, 2)
        self.scale = nn.Parameter(torch.randn(1, 4, 1))

    def forward(self, x):
        x = self.norm(torch.tanh(self.second(self.first(x))))
        return (self.line(x.flatten(2)) * self.scale).mean(2)


@DTYPES
@pytest.mark.parametrize("few", [0, 1000], ids=["by-row", "by-patches"])
def test_conv_net(close, dtype, few, monkeypatch):
    monkeypatch.setattr(convolutions, "_FEW_POSITIONS", few)
    g = torch.Generator().manual_seed(5)
    x, y = torch.randn(5, 2, 11, 12, generator=g), torch.randint(0, 4, (5,), generator=g)
    check_step(
        close, ConvNet(), (x[:3], y[:3]), (x[3:], y[3:]), dtype, loss=F.cross_entropy, label_shift=0
    )


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "llama-tied",
        "gemma",
        "mixtral",
        "t5",
        "mamba",
        "lora",
        "mixtral-lora",
        "deberta-v3",
    ],
)
def test_language_model(close, name):
    """RMS norms, padding ids, experts, position biases, the general rule; in fp32."""
    train, val = token_batch(3, 9, VOCAB, seed=1, ragged=True), token_batch(2, 9, VOCAB, seed=2)
    check_step(close, LANGUAGE_MODELS[name](), train, val, torch.float32)


@pytest.mark.parametrize("most", [0, 9], ids=["by-token", "by-row"])
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "mixtral-lora"])
def test_experts(close, name, most, monkeypatch):
    """Both ways to an expert's dots: rows of one length, and every token's product with the direction."""
    monkeypatch.setattr(transformers_layers, "_MOST_FILLED", most)
    train, val = token_batch(3, 9, VOCAB, seed=1, ragged=True), token_batch(2, 9, VOCAB, seed=2)
    check_step(close, LANGUAGE_MODELS[name](), train, val, torch.float32)


@DTYPES
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("chunk", [10, 100], ids=["one-row", "all-rows"])
def test_fused_head(close, tied, chunk, dtype, monkeypatch):
    """Two targets, a loss scale; and given directions."""
    monkeypatch.setitem(fused_head._CHUNK_ELEMENTS, "cpu", 61 * chunk)
    train = token_batch(3, 17, seed=1, ragged=True)
    vals = {"a": token_batch(1, 17, seed=2), "b": token_batch(2, 17, seed=3, ragged=True)}
    exact = tiny_gpt2(tied=tied)
    model = copy.deepcopy(exact).to(dtype)
    directions = {name: gradient(exact, *val) for name, val in vals.items()}
    fuse_head(model)
    for riding in (True, False):
        engine = GradDotProdEngine(model, vals if riding else None, norms=True)
        engine.attach()
        if not riding:
            engine.set_directions(directions)
        engine.attach_train_batch(*train, 0, torch.arange(3))
        x, y = engine.prepare_forward_input(*train)
        (model(x, labels=y).loss * 64).backward()
        engine.prepare_gradients()
        check_norms(close, engine, exact, train, vals.values(), TOLERANCE[dtype])
        engine.detach()


def test_several_targets_micro_batches_and_columns(close):
    """Two micro-batches of one step with ragged rows; what a store gets; an unlabelled sample."""
    model = tiny_gpt2().double()
    x, y = token_batch(5, 15, seed=1, ragged=True)
    y[3] = -100
    vals = {"a": token_batch(1, 15, seed=2), "b": token_batch(3, 15, seed=3, ragged=True)}
    engine = attached(model, vals, norms=True, exclude=["transformer.ln_f.weight"])
    engine.store = Store()
    for at, factor in ((slice(0, 2), 0.25), (slice(2, 5), 0.75)):
        run(engine, (x[at], y[at]), factor=factor)
    names = [n for n, _ in model.named_parameters() if "ln_f.weight" not in n]
    grads = [gradient(model, x[i : i + 1], y[i : i + 1]) for i in (0, 1, 2, 4)]
    val_grads = [gradient(model, *val) for val in vals.values()]
    of = lambda g: torch.cat([g[n].flatten() for n in names])
    samples = torch.stack([of(g).norm() for g in grads])
    targets = torch.stack([of(g).norm() for g in val_grads])
    dots = torch.stack([torch.stack([of(v) @ of(g) for g in grads]) for v in val_grads])
    kept = [0, 1, 2, 4]
    got, cosines = engine.gradient_norms(), engine.cosines()
    assert got[3] == 0 and not cosines[:, 3].any() and cosines.shape == (2, 5)
    close(got[kept], samples, 1e-10)
    close(engine.target_norms(), targets, 1e-10)
    close(cosines[:, kept], dots / (targets[:, None] * samples), 1e-10)
    engine.aggregate_and_log()
    assert torch.equal(engine.store.column("norm"), got)
    for k, name in enumerate(vals):
        assert torch.equal(engine.store.column(f"cosine_{name}"), cosines[k])


def test_bf16(close):
    exact = tiny_gpt2()
    train, val = token_batch(4, 31, seed=1, ragged=True), token_batch(2, 31, seed=2)
    engine = attached(copy.deepcopy(exact), val, norms=True)
    with torch.autocast("cpu", torch.bfloat16):
        run(engine, train)
    check_norms(close, engine, exact, train, [val], 2e-2)


def own_norms(rank, world, kind):
    """Norms and cosines of this process's rows, under DDP or sharded."""
    inner = model = tiny_gpt2()
    if kind == "ddp":
        model = DistributedDataParallel(inner)
    else:
        fully_shard(model)
    engine = attached(inner, token_batch(2, 17, seed=2, ragged=True), norms=True)
    x, y = (rows[2 * rank : 2 * rank + 2] for rows in token_batch(4, 17, seed=1, ragged=True))
    engine.attach_train_batch(x, y, 0, None)
    xx, yy = engine.prepare_forward_input(x, y)
    model(xx, labels=yy).loss.backward()
    engine.prepare_gradients()
    return engine.gradient_norms(), engine.cosines(), engine.target_norms()


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_several_processes(close, tmp_path, kind):
    train, val = token_batch(4, 17, seed=1, ragged=True), token_batch(2, 17, seed=2, ragged=True)
    parts = on_processes(2, tmp_path, own_norms, kind)
    norms, cosines = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    samples, target = sample_norms(tiny_gpt2(), train), norm(gradient(tiny_gpt2(), *val))
    close(norms, samples, 1e-5)
    dots = total(sample_dots(tiny_gpt2(), train, val)[0])
    cosines_wanted = dots / samples / target
    close(cosines, cosines_wanted, 1e-5, torch.full_like(cosines_wanted, 10))
    for part in parts:
        close(part[2], target, 1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(close, reentrant):
    """A forward that is run once more is not another use."""
    model = tiny_gpt2()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    check_step(close, model, token_batch(3, 9, seed=1), token_batch(2, 9, seed=2), torch.float32)


def test_refusals():
    model, val = tiny_gpt2(), token_batch(1, 9, seed=2)
    with pytest.raises(GraddotError, match="norms=True is of whole samples, and per_token=True"):
        GradDotProdEngine(model, norms=True, per_token=True)
    engine = attached(model, val)
    run(engine, token_batch(2, 9, seed=1))
    with pytest.raises(GraddotError, match="norms and cosines need"):
        engine.cosines()
    engine.detach()
    with pytest.raises(GraddotError, match="no scores"):
        attached(model, val, norms=True).gradient_norms()
