"""torch.compile of a whole model with an engine attached: scores, gradients, graphs and breaks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from brute_force import gradient, lm_loss, sample_dots, tiny_gpt2, token_batch, total
from graddot_lm import GraddotError, GradDotProdEngine, fuse_head
from loop_steps import run
from torch import nn
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    counters.clear()
    yield
    assert not counters["graph_break"], list(counters["graph_break"])


def graphs():
    return counters["stats"]["unique_graphs"]


def compiled(model, backend="aot_eager"):
    return torch.compile(model, backend=backend, fullgraph=True)


def in_a_function(model, backend="aot_eager"):
    """The model's hooks are then a part of the graph."""
    function = lambda *args, **kwargs: model(*args, **kwargs)
    return torch.compile(function, backend=backend, fullgraph=True)


def gpt2():
    model = tiny_gpt2(layers=1)
    model.loss_type = "ForCausalLM"  # the one it has; naming it avoids a warning in the graph
    return model


def unscored(model):
    """A copy without compiled or fused forwards."""
    model = copy.deepcopy(model)
    model.__dict__.pop("forward", None)
    return model


def own_loss(engine, call, x, y, loss=lm_loss):
    out = call(x)
    return engine.track_loss(loss(getattr(out, "logits", out), y))


def its_loss(engine, call, x, y):
    return call(x, labels=y).loss


def step(engine, call, train, i=0, loss=own_loss, factor=1.0):
    """One micro-batch through the compiled model."""
    engine.attach_train_batch(*train, i, torch.arange(len(train[1])))
    (loss(engine, call, *engine.prepare_forward_input(*train)) * factor).backward()
    engine.prepare_gradients()


def check(engine, close, train, val, tolerance, loss=lm_loss):
    """Scores and .grad of a step that ran, against brute force."""
    model = unscored(engine.model)
    want, scales = sample_dots(model, train, val, loss=loss)
    close(engine.aggregate_and_log(), total(want), tolerance, total(scales))
    for name, g in gradient(model, *train, loss=loss).items():
        error = (engine.model.get_parameter(name).grad.double() - g).norm() / g.norm()
        assert error <= tolerance, name
    engine.model.zero_grad(set_to_none=True)


VAL = token_batch(2, 11, seed=99)


@pytest.mark.parametrize("way", [compiled, in_a_function])
def test_gpt2(way, close):
    """Batches of two shapes; the first step runs uncompiled."""
    model = gpt2().double()
    call = way(model)
    if way is compiled:  # compiled before the engine is there
        call(VAL[0]).logits.sum().backward()
        model.zero_grad()
    engine = GradDotProdEngine(model, VAL, label_shift=1, padding={"inputs": 0})
    engine.attach()
    seen = []
    for i, shape in enumerate([(4, 11), (4, 11), (4, 11), (3, 13), (5, 12), (6, 14)]):
        train = token_batch(*shape, seed=i, ragged=True)
        step(engine, call, train, i)
        check(engine, close, train, VAL, 1e-10)
        seen.append(graphs())
    before = int(way is compiled)
    print(seen)
    assert seen[0] == before, "the first step was compiled"
    assert seen[1] == seen[2] == before + 1
    assert seen[3] == seen[4] == seen[5] <= before + 2, "one graph serves all shapes"


def test_fused_head_accumulation_and_targets(close):
    model = fuse_head(gpt2().double())
    call = in_a_function(model)
    vals = {"a": VAL, "b": token_batch(1, 11, seed=98)}
    engine = GradDotProdEngine(model, vals)
    engine.attach()
    for i in range(3):
        batches = [token_batch(3, 11, seed=2 * i + k, ragged=True) for k in range(2)]
        for batch in batches:
            step(engine, call, batch, i, its_loss, factor=0.5)
        plain = unscored(model)
        got = engine.aggregate_and_log()
        for row, val in zip(got, vals.values(), strict=True):
            parts = [sample_dots(plain, batch, val) for batch in batches]
            want, scale = (torch.cat([total(p[k]) for p in parts]) for k in (0, 1))
            close(row, want, 1e-10, scale)
        want = [gradient(plain, *batch) for batch in batches]
        for name, p in model.named_parameters():
            mean = (want[0][name] + want[1][name]) / 2
            assert (p.grad - mean).norm() <= 1e-10 * mean.norm(), name
        model.zero_grad(set_to_none=True)
        if i == 0:  # micro-batches after the first are compiled
            first = graphs()
    assert graphs() == first == 1


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config)


def test_llama_given_directions(close):
    """RMS norms; the model alone computes the directions, and is not compiled anew for that."""
    model = llama()
    call = compiled(model)
    engine = GradDotProdEngine(model, label_shift=1)
    engine.attach()
    for i in range(3):
        loss = lambda model, inputs, labels: lm_loss(model(**inputs).logits, labels)
        batch = {"input_ids": VAL[0]}, VAL[1]
        engine.set_directions(engine.compute_directions([batch], loss))
        train = token_batch(4, 11, seed=i)
        step(engine, call, train, i)
        check(engine, close, train, VAL, 1e-5)
    assert graphs() == 1


class Shared(nn.Module):
    """A weight of two embeddings and a head; layers called twice, also on the very same input."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.source, self.target = nn.Embedding(30, 10, padding_idx=3), nn.Embedding(30, 10, 3)
        self.mix, self.norm = nn.Linear(10, 10), nn.LayerNorm(10)
        self.head = nn.Linear(10, 30, bias=False)
        self.target.weight = self.source.weight
        self.head.weight = self.source.weight

    def forward(self, ids):
        x = self.source(ids) + 0.5 * self.target((7 * ids + 1) % 30) + self.source(ids)
        x = torch.tanh(self.mix(self.norm(x)) + self.mix(self.norm(x)))
        return self.head(torch.tanh(self.mix(self.norm(x))))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_parameters_with_several_uses(backend, close):
    """Calls that are the same to a compiler stay two; memory that it reuses is not ours."""
    model = Shared().double()
    call, val = compiled(model, backend), token_batch(2, 11, 30, seed=7)
    engine = GradDotProdEngine(model, val, label_shift=1)
    engine.attach()
    for i in range(3):
        train = token_batch(5, 11, 30, seed=i)
        step(engine, call, train, i)
        check(engine, close, train, val, 1e-10)
    assert graphs() == 1
