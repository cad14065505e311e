"""The fused head with an engine and in a model, against float64 definitions."""

import copy

import pytest
import torch
import torch.nn.functional as F
from brute_force import gradient, lm_loss, sample_dots, tiny_gpt2, token_batch, total
from engine_steps import TOLERANCE, close, relative
from graddot_lm import (
    GraddotError,
    GradDotProdEngine,
    fuse_head,
    linear_cross_entropy,
    unfuse_head,
)
from model_zoo import adapters, moe
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import ModelOutput

from graddot_kernels import fused_head

# With an engine


def fused_step(model, train, val, factor=1.0, **kwargs):
    """Scores and dots by parameter of one step through the fused head."""
    model.zero_grad(set_to_none=True)
    engine = GradDotProdEngine(model, val, per_parameter=True, **kwargs)
    engine.attach()
    engine.attach_train_batch(*train, 0, torch.arange(len(train[0])))
    x, y = engine.prepare_forward_input(*train)
    (model(x, labels=y).loss * factor).backward()
    engine.prepare_gradients()
    dots = engine.parameter_dots()
    scores = engine.aggregate_and_log()
    engine.detach()
    return scores, dots


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("v", [1, 3])
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("chunks", [True, False], ids=["chunks", "joint"])
def test_gpt2_with_engine(chunks, tied, ragged, v, dtype, monkeypatch):
    if chunks:  # a 17-token row in two pieces
        monkeypatch.setitem(fused_head._CHUNK_ELEMENTS, "cpu", 61 * 10)
    train = token_batch(4, 17, seed=1, ragged=ragged)
    val = token_batch(v, 17, seed=2, ragged=ragged)
    model = tiny_gpt2(tied=tied)
    want, scales = sample_dots(model, train, val)
    want_grad = gradient(model, *train)
    model = fuse_head(copy.deepcopy(model).to(dtype))
    for factor in (1.0, 64.0):
        scores, dots = fused_step(model, train, val, factor)
        close(scores, total(want), TOLERANCE[dtype], total(scales))
        for name, dot in dots.items():
            close(dot, want[name], TOLERANCE[dtype], scales[name])
        for name, p in model.named_parameters():
            assert relative(p.grad / factor, want_grad[name]) <= TOLERANCE[dtype], name


def test_two_targets_and_bias():
    """An untied head with a bias; each target's scores are those of a run of its own."""
    model = tiny_gpt2(tied=False)
    model.lm_head = nn.Linear(24, 61)
    fuse_head(model.double())
    train = token_batch(3, 9, seed=1)
    vals = {"a": token_batch(1, 9, seed=2), "b": token_batch(2, 9, seed=3, ragged=True)}
    both, dots = fused_step(model, train, vals)
    for row, val in zip(both, vals.values(), strict=True):
        plain = copy.deepcopy(model)
        want, _ = sample_dots(plain, train, val)
        close(row, total(want), 1e-10)
    assert "lm_head.bias" in dots


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_given_directions(tied):
    model = tiny_gpt2(tied=tied).double()
    train, val = token_batch(4, 17, seed=1, ragged=True), token_batch(3, 17, seed=2, ragged=True)
    want, _ = sample_dots(model, train, val)
    engine = GradDotProdEngine(fuse_head(model))
    engine.set_directions({"a": gradient(model, *val), "b": gradient(model, *train)})
    engine.attach()
    engine.attach_train_batch(*train, 0, torch.arange(4))
    x, y = engine.prepare_forward_input(*train)
    (5 * model(x, labels=y).loss).backward()
    engine.prepare_gradients()
    close(engine.aggregate_and_log()[0], total(want), 1e-10)
    want_grad = gradient(model, *train)
    for name, p in model.named_parameters():
        assert relative(p.grad / 5, want_grad[name]) <= 1e-10, name


def test_engine_without_head_scores():
    """The head excluded, and frozen: everything else is still exact."""
    train, val = token_batch(3, 9, seed=1), token_batch(2, 9, seed=2)
    model = tiny_gpt2(tied=False).double()
    want, _ = sample_dots(model, train, val)
    want.pop("lm_head.weight")
    fuse_head(model)
    scores, _ = fused_step(model, train, val, exclude=["lm_head.weight"])
    close(scores, total(want), 1e-10)
    model.lm_head.requires_grad_(False)
    scores, _ = fused_step(model, train, val)
    close(scores, total(want), 1e-10)


def test_wrong_label_shift_is_refused():
    model = fuse_head(tiny_gpt2())
    train, val = token_batch(3, 9, seed=1, ragged=True), token_batch(2, 9, seed=2)
    with pytest.raises(GraddotError, match="label_shift=0, but the loss used"):
        fused_step(model, train, val, label_shift=0)


class TiedModel(nn.Module):
    """A head called by hand; the embedding of the same weight, before it or after it."""

    def __init__(self, *, after=False, padding_idx=None):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.mix = nn.Embedding(19, 12, padding_idx), nn.Linear(12, 12)
        self.head = nn.Linear(12, 19, bias=False)
        self.head.weight = self.embedding.weight
        self.after, self.reduction = after, "mean"

    def forward(self, ids, labels=None):
        hidden = self.embedding(ids)
        if self.after:  # the head sees a constant, and the embedding comes behind it
            hidden = torch.ones(*ids.shape, 12)
        if labels is None:
            return F.linear(self.mix(hidden), self.head.weight)
        mixed = self.mix(hidden)
        loss, _ = linear_cross_entropy(mixed, self.head, labels, reduction=self.reduction)
        return ModelOutput(loss=loss + self.embedding(ids).square().mean() if self.after else loss)


def own_batch(rows, seed):
    ids, _ = token_batch(rows, 9, 19, seed=seed)
    return ids, token_batch(rows, 9, 19, seed=seed + 10)[0]


@pytest.mark.parametrize("padded", [None, "val", "train"])
def test_a_head_of_ones_own(padded):
    """Also with nothing but padding on one side, where the embedding has no gradient."""
    model = TiedModel(padding_idx=None if padded is None else 7).double()
    train, val = own_batch(4, 1), own_batch(2, 2)
    if padded is not None:
        (val if padded == "val" else train)[0].fill_(7)

    def loss(logits, labels):
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    want, _ = sample_dots(model, train, val, loss=loss)
    scores, _ = fused_step(model, train, val)
    close(scores, total(want), 1e-10)


def test_what_the_fused_head_cannot_score_is_refused():
    train, val = own_batch(4, 1), own_batch(2, 2)
    with pytest.raises(GraddotError, match="one embedding before it"):
        fused_step(TiedModel(after=True), train, val)
    model = TiedModel()
    model.reduction = "sum"
    with pytest.raises(
        GraddotError, match="loss is a sum over labelled tokens, but .* pass loss_reduction"
    ):
        fused_step(model, train, val)
    with pytest.raises(GraddotError, match="head's loss is a mean over labelled tokens"):
        fused_step(fuse_head(tiny_gpt2()), train, val, loss_reduction="sum")


# In a model


def test_fuse_and_unfuse():
    model = tiny_gpt2().eval()
    ids, labels = token_batch(3, 9, seed=1, ragged=True)
    want = lm_loss(model(ids).logits, labels)
    state = {name: p.clone() for name, p in model.state_dict().items()}
    fuse_head(model)
    out = model(ids, labels=labels)
    torch.testing.assert_close(out.loss, want)
    assert out.token_losses.shape == ids.shape
    torch.testing.assert_close(out.token_losses.sum() / (labels[:, 1:] != -100).sum(), want)
    assert model(ids).logits.shape == (3, 9, 61)
    torch.testing.assert_close(copy.deepcopy(model)(ids, labels=labels).loss, want)
    with pytest.raises(GraddotError, match="fused head already"):
        fuse_head(model)
    unfuse_head(model)
    assert model(ids, labels=labels).logits is not None
    with pytest.raises(GraddotError, match="no fused head"):
        unfuse_head(model)
    for name, p in model.state_dict().items():
        assert torch.equal(p, state[name])


def test_adapters_around_the_model():
    model = adapters(r=4)
    ids, labels = token_batch(3, 9, seed=1, ragged=True)
    want = model(ids, labels=labels).loss
    assert fuse_head(model) is model
    out = model(ids, labels=labels)
    torch.testing.assert_close(out.loss, want)
    assert out.token_losses.shape == ids.shape
    unfuse_head(model)
    assert model(ids, labels=labels).logits is not None


def test_attention_mask_and_another_architecture():
    config = LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).double()
    ids, labels = token_batch(3, 9, seed=1)
    mask = torch.ones_like(ids)
    mask[0, 5:], labels[0, 5:] = 0, -100
    want = model(ids, attention_mask=mask, labels=labels).loss
    want.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    loss = fuse_head(model)(ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    # The model's own loss is in fp32 whatever its parameters are.
    assert relative(loss.detach(), want.detach().double()) <= 1e-6
    for name, p in model.named_parameters():
        assert relative(p.grad, grads[name]) <= 1e-6, name


def test_models_that_cannot_be_fused():
    class Capped(LlamaForCausalLM):
        def forward(self, *args, labels=None, **kwargs):
            out = super().forward(*args, **kwargs)
            out.loss = None if labels is None else lm_loss(30 * torch.tanh(out.logits), labels)
            return out

    config = LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    with pytest.raises(GraddotError, match="computes another loss"):
        fuse_head(Capped(config))
    with pytest.raises(GraddotError, match="not a base model with a Linear head"):
        fuse_head(nn.Sequential(nn.Linear(3, 4)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cap_that_new_weights_do_not_reach_is_seen(dtype):
    config = Gemma2Config(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).to(dtype)
    with pytest.raises(GraddotError, match="computes another loss"):
        fuse_head(model)
    config.final_logit_softcapping = None
    unfuse_head(fuse_head(model))


def test_other_forms_of_labels_are_refused():
    """Which the model's own loss takes."""
    ids, labels = token_batch(2, 9, seed=1)
    model = fuse_head(tiny_gpt2().eval())
    with pytest.raises(GraddotError, match="got shift_labels, which the fused head does not take"):
        model(ids, labels=labels, shift_labels=ids.flip(1))
    with pytest.raises(GraddotError, match="got ignore_index=5, which"):
        model(ids, labels=labels, ignore_index=5)
    usual = model(ids, labels=labels, shift_labels=None, ignore_index=-100).loss
    assert usual == model(ids, labels=labels).loss


def test_the_auxiliary_loss_of_routers_is_not_left_out_unseen():
    model = fuse_head(moe("Mixtral", num_local_experts=4))
    ids, labels = token_batch(2, 9, 30, seed=1)
    want = model(ids, labels=labels).loss
    with pytest.raises(GraddotError, match="the auxiliary loss of its routers"):
        model(ids, labels=labels, output_router_logits=True)
    model.config.output_router_logits = True
    with pytest.raises(GraddotError, match="with router_aux_loss_coef=0"):
        model(ids, labels=labels)
    assert model(ids, labels=labels, output_router_logits=False).loss == want
    model.router_aux_loss_coef = 0.0
    assert model(ids, labels=labels).loss == want
