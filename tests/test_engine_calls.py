"""What detach leaves of an engine, copies and evaluation beside it, the order of its calls, and
refusals that name what is wrong."""

import copy

import pytest
import torch
import torch.nn.functional as F
from brute_force import tiny_gpt2, token_batch
from engine_steps import MLP, run_step
from graddot_lm import GraddotError, GradDotProdEngine
from torch import nn
from torch.nn.utils import prune


def test_detach_restores_the_model():
    model = tiny_gpt2()
    model.lm_head.requires_grad_(False)
    own = model.transformer.ln_f.forward
    model.transformer.ln_f.forward = own
    before = {n: (p.clone(), p.requires_grad) for n, p in model.named_parameters()}
    dicts = [dict(m.__dict__) for m in model.modules()]
    run_step(model, token_batch(2, 9, seed=1), token_batch(1, 9, seed=2))
    assert [dict(m.__dict__) for m in model.modules()] == dicts
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name][0]) and p.requires_grad == before[name][1]


def test_a_copy_of_an_attached_model_is_a_plain_model():
    model, val = tiny_gpt2(), token_batch(1, 9, seed=2)
    engine = GradDotProdEngine(model, val)
    engine.attach()
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.lm_head.weight.zero_()
    engine.attach_train_batch(*token_batch(2, 9, seed=1), 0, None)
    assert not copied(val[0]).logits.any() and model.lm_head.weight.any()


def test_evaluation_between_steps():
    model, val = tiny_gpt2(), token_batch(2, 9, seed=2)
    engine = GradDotProdEngine(model, val)
    engine.attach()
    x, _ = token_batch(3, 20, seed=5)
    want = tiny_gpt2()(x).logits
    assert torch.equal(model(x).logits, want)
    engine.detach_for_evaluation()
    assert "forward" not in model.lm_head.__dict__
    engine.reattach_after_evaluation()
    assert torch.equal(model(x).logits, want)


class Uncovered(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.memory = nn.Linear(4, 4), nn.LSTM(4, 4, proj_size=2)


def _engine_error(*args, match, **kwargs):
    with pytest.raises(GraddotError, match=match):
        GradDotProdEngine(*args, **kwargs)


def test_refusals_name_what_is_wrong():
    val = torch.randn(2, 4), torch.zeros(2, dtype=torch.long)
    _engine_error(
        Uncovered(), val, match=r"5 trainable parameters \(87.2%.*\n  memory.weight_ih_l0: no rule"
    )
    _engine_error(MLP(), (val[0][:0], val[1][:0]), match="0 inputs")
    _engine_error(MLP(), {}, match="no target")
    _engine_error(MLP(), (val[0], torch.full((2,), -100)), match="no labelled token")
    _engine_error(MLP(), val[0], match="validation data 'val' is a Tensor; expected")
    _engine_error(MLP(), val, exclude=["nothing"], match="nothing")
    _engine_error(MLP(), val, loss_reduction="max", match="loss_reduction is 'max'; expected")
    _engine_error(MLP(), val, label_shift=2, match="label_shift is 2; expected 'auto', 0 or 1")
    _engine_error(MLP(), val, global_mean=True, loss_reduction="sum", match="the loss is a sum")
    _engine_error(MLP().requires_grad_(False), val, match="the model has no trainable parameter")
    _engine_error(nn.Embedding(5, 3, max_norm=1.0), val, match="max_norm")
    _engine_error(
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), val, match="1.weight: BatchNorm"
    )
    pruned = prune.l1_unstructured(nn.Linear(4, 4), "weight", 3)
    normed = nn.utils.weight_norm(nn.Linear(4, 4))
    _engine_error(nn.Sequential(pruned), val, match="0.weight_orig: a hook computes weight before")
    _engine_error(nn.Sequential(normed), val, match="0.weight_g: a hook computes weight before")
    spectral = nn.utils.spectral_norm(nn.Linear(4, 4))
    _engine_error(
        nn.Sequential(spectral), val, match="0.weight_orig: a hook computes weight before"
    )


class DetachedEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(30, 10), nn.Linear(10, 30, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.embedding(ids).detach())


def test_a_shared_gradient_that_cannot_be_completed_is_refused():
    train, val = token_batch(3, 9, 30, seed=1), token_batch(1, 9, 30, seed=2)
    with pytest.raises(GraddotError, match=r"embedding.weight: the loss depends"):
        run_step(DetachedEmbedding(), train, val)


@pytest.mark.parametrize("change", ["unfrozen", "replaced"])
def test_a_parameter_that_the_engine_does_not_know_is_refused(change):
    model, train, val = tiny_gpt2(), token_batch(2, 9, seed=1), token_batch(1, 9, seed=2)
    weight = model.transformer.h[0].mlp.c_fc.weight.requires_grad_(change == "replaced")
    engine = GradDotProdEngine(model, val)
    engine.attach()
    if change == "unfrozen":
        weight.requires_grad_()
    else:
        model.transformer.h[0].mlp.c_fc.weight = nn.Parameter(weight.detach().clone())
    with pytest.raises(
        GraddotError, match="mlp.c_fc.weight: not a trainable parameter of the model"
    ):
        engine.attach_train_batch(*train, 0, None)


@pytest.mark.parametrize("when", ["between micro-batches", "in one"])
def test_a_parameter_that_was_frozen_is_refused(when):
    """Not to be left out by some layers' rules, and scored as if it were trained by others'."""
    model, train, val = tiny_gpt2(), token_batch(2, 9, seed=1), token_batch(1, 9, seed=2)
    engine = GradDotProdEngine(model, val, exclude=["transformer.ln_f.bias"])
    engine.attach()
    words = r"^transformer.ln_f.weight: trained when .* frozen now"
    if when == "in one":
        engine.attach_train_batch(*train, 0, None)
        inputs, labels = engine.prepare_forward_input(*train)
    model.transformer.ln_f.requires_grad_(False)
    if when == "in one":
        model(inputs, labels=labels).loss.backward()
        with pytest.raises(GraddotError, match=words):
            engine.prepare_gradients()
    else:
        with pytest.raises(GraddotError, match=words):
            engine.attach_train_batch(*train, 0, None)


def test_wrong_label_shift_is_refused():
    train, val = token_batch(3, 9, seed=1, ragged=True), token_batch(1, 9, seed=2)
    with pytest.raises(GraddotError, match="label_shift=1"):
        run_step(tiny_gpt2(), train, val, label_shift=0)


class TokensFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x.transpose(0, 1).flatten(0, 1)).view(5, -1, 4).transpose(0, 1)


def test_mixed_samples_are_refused():
    x, y = torch.randn(3, 5, 4), torch.zeros(3, 5, dtype=torch.long)
    with pytest.raises(GraddotError, match=r"layer linear gets an input \(of shape \(20, 4\)\)"):
        run_step(TokensFirst(), (x, y), (x[:1], y[:1]), loss=F.cross_entropy, label_shift=0)


def test_order_of_calls_is_checked():
    model, val = tiny_gpt2(), token_batch(1, 9, seed=2)
    x, y = token_batch(2, 9, seed=1)
    engine = GradDotProdEngine(model, val)
    with pytest.raises(GraddotError, match="attach"):
        engine.attach_train_batch(x, y, 0, None)
    engine.attach()
    with pytest.raises(GraddotError, match="call attach_train_batch before prepare_forward_input"):
        engine.prepare_forward_input(x, y)
    with pytest.raises(GraddotError, match="attached already"):
        engine.attach()
    with pytest.raises(GraddotError, match="another engine"):
        GradDotProdEngine(model, val).attach()
    with pytest.raises(GraddotError, match="no scores"):
        engine.aggregate_and_log()
    with pytest.raises(GraddotError, match="2 inputs and 1 labels"):
        engine.attach_train_batch(x, y[:1], 0, None)
    engine.attach_train_batch(x, y, 0, None)
    with pytest.raises(GraddotError, match=r"previous batch had no prepare_gradients\(\)"):
        engine.attach_train_batch(x, y, 0, None)
    with pytest.raises(GraddotError, match=r"training rows have shape \(5,\)"):
        engine.prepare_forward_input(x[:, :5], y[:, :5])
    with pytest.raises(GraddotError, match="no forward"):
        engine.prepare_gradients()
    xx, yy = engine.prepare_forward_input(x, y)
    loss = model(xx, labels=yy).loss
    with pytest.raises(GraddotError, match="no backward"):
        engine.prepare_gradients()
    with pytest.raises(GraddotError, match="ran twice"):
        model(xx)
    loss.backward()
    engine.prepare_gradients()
    with pytest.raises(GraddotError, match=r"needs GradDotProdEngine\(..., per_parameter=True\)"):
        engine.parameter_dots()
    with pytest.raises(GraddotError, match=r"needs GradDotProdEngine\(..., per_token=True\)"):
        engine.token_dots()
    with pytest.raises(GraddotError, match="under way"):
        engine.detach_for_evaluation()
    assert engine.aggregate_and_log().shape == (2,)
