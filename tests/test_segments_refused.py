"""Samples that share one row where they cannot be scored: refused, with the reason."""

import pytest
import torch
import torch.nn.functional as F
from brute_force import lm_loss, tiny_gpt2, token_batch
from graddot_lm import GraddotError, segment_lengths
from loop_steps import attached
from model_zoo import VOCAB, adapters, causal, moe, shaken
from packed_rows import LENGTHS, batch_of, direction_of, run, samples
from process_group import on_processes
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers.modeling_outputs import CausalLMOutput


class Blocks(nn.Module):
    """Logits of a layer `inner` between an embedding and a head."""

    def __init__(self, inner):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.inner, self.head = nn.Embedding(VOCAB, 16), inner, nn.Linear(16, VOCAB)

    def forward(self, ids):
        return self.head(self.inner(self.table(ids)))


class Leak(nn.Module):
    """Adds a little of the token before."""

    def __init__(self, share):
        super().__init__()
        self.share, self.linear = share, nn.Linear(16, 16)

    def forward(self, x):
        return self.linear(x + self.share * F.pad(x, (0, 0, 1, 0))[:, :-1])


class Causal(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(16, 16, 3)

    def forward(self, x):
        return self.conv(F.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2)


class LastState(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(16, 16, batch_first=True)

    def forward(self, x):
        return self.lstm(x)[0]


class OwnParameters(nn.Module):
    """Which are different in every place."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(64, 16))

    def forward(self, x):
        return x * self.scale[: x.shape[1]]


class Backwards(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x):
        return self.linear(x.flip(1)).flip(1)


INNER = {
    "leak": (lambda: Leak(0.5), "layer inner.linear gets an input .* samples run alone give"),
    "small-leak": (
        lambda: Leak(5e-5),
        "layer inner.linear gets .* changes with the tokens of other",
    ),
    "conv1d": (Causal, "layer inner.conv gets an input"),
    "lstm": (LastState, "layer head gets an input .* states may run on through the row"),
    "own-parameters": (
        OwnParameters,
        "layer inner of type OwnParameters has .* each token by itself",
    ),
    "another-order": (Backwards, "layer inner.linear gets an input"),
}


def packed(engine, model, lengths=LENGTHS):
    ids, labels = token_batch(1, sum(lengths), VOCAB, seed=1)
    labels[0, torch.tensor(lengths).cumsum(0)[:-1]] = -100
    engine.attach_train_batch(ids, labels, 0, None, segments=lengths)
    out = model(ids)
    engine.track_loss(lm_loss(getattr(out, "logits", out), labels)).backward()
    engine.prepare_gradients()
    return engine.aggregate_and_log()


@pytest.mark.parametrize("kind", INNER)
def test_models_that_mix_samples_are_refused(kind):
    make, message = INNER[kind]
    model = shaken(Blocks(make()))
    engine = attached(model)
    engine.set_directions({n: torch.ones_like(p) for n, p in model.named_parameters()})
    if kind == "own-parameters":
        with pytest.raises(GraddotError, match=message):
            packed(engine, model)
        return
    if kind != "conv1d":
        packed(engine, model, [7])  # a row of one sample is as good as any
    with pytest.raises(GraddotError, match=message):
        packed(engine, model)
    engine.clear_gradients()
    with pytest.raises(GraddotError, match=message):  # and again
        packed(engine, model)


REFUSED = {
    "mamba": lambda: causal("Mamba", state_size=4),
    "gpt-oss": lambda: moe("GptOss", num_local_experts=4),
    "dora": lambda: adapters(r=4, use_dora=True),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_parameters_around_scored_layers_are_refused(kind):
    model, rows = REFUSED[kind](), samples()
    engine = attached(model, label_shift="auto")
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    engine.set_directions({n: torch.ones_like(p) for n, p in trained.items()})
    with pytest.raises(GraddotError, match="has parameters of its own around scored layers"):
        run(engine, batch_of(rows), rows)


def sharded(rank, world):
    model, rows = fully_shard(tiny_gpt2()), samples()
    engine = attached(model, label_shift="auto")
    engine.set_directions({n: torch.ones(p.shape) for n, p in model.named_parameters()})
    with pytest.raises(
        GraddotError, match="the model is sharded, and would have to be run once for"
    ):
        run(engine, batch_of(rows), rows)


def test_sharded_models_are_refused(tmp_path):
    on_processes(1, tmp_path, sharded)


@pytest.mark.parametrize("by", ["cache", "attention_mask", "no position_ids"])
def test_attention_that_does_not_heed_samples_is_refused(by):
    model, rows = causal("Llama"), samples()
    batch, options = batch_of(rows), {"use_cache": by == "cache"}
    if by == "attention_mask":
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    if by == "no position_ids":
        del batch["position_ids"]
    engine = attached(model, label_shift="auto")
    engine.set_directions(direction_of(model))
    engine.attach_train_batch(batch, None, 0, None, segments=LENGTHS)
    with pytest.raises(
        GraddotError, match="self_attn.* gets an input .* only without an attention_m"
    ):
        model(**batch, **options)


def test_a_loss_across_samples_is_refused():
    """The first label of a sample would be the target of the one before; in every step."""
    model, rows = causal("Llama"), samples()
    engine = attached(model, label_shift="auto")
    engine.set_directions(direction_of(model))
    run(engine, batch_of(rows), rows)
    engine.aggregate_and_log()
    batch = batch_of(rows, separator_id=7)
    engine.attach_train_batch(batch, None, 1, None, segments=LENGTHS)
    with pytest.raises(
        GraddotError, match="token 5 .*, with which sample 1 begins, .* label 7, .* -100"
    ):
        model(**batch, use_cache=False)


def test_labels_of_no_sample_are_refused():
    model, rows = causal("Llama"), samples()
    engine = attached(model, label_shift="auto")
    engine.set_directions(direction_of(model))
    with pytest.raises(
        GraddotError, match="token 25 of the packed row, which is of no sample, .* in the loss"
    ):
        engine.attach_train_batch(batch_of(rows), None, 0, None, segments=[5, 1, 7, 2, 9])


class MeanOfMeans(nn.Module):
    """A loss that is the mean over samples, not over tokens."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, position_ids, labels, use_cache):
        logits = self.model(input_ids, position_ids=position_ids, use_cache=use_cache).logits
        lengths = segment_lengths(position_ids)
        parts = zip(logits.split(lengths, 1), labels.split(lengths, 1), strict=True)
        losses = [lm_loss(x, y) for x, y in parts if (y[:, 1:] != -100).any()]
        loss = torch.stack(losses).mean() if losses else 0 * logits.sum()
        return CausalLMOutput(loss=loss, logits=logits)


def test_another_loss_than_the_mean_over_tokens_is_refused():
    model, rows = MeanOfMeans(causal("Llama")), samples()
    engine = attached(model)
    engine.set_directions({n: torch.ones_like(p) for n, p in model.named_parameters()})
    run(engine, batch_of(rows[:1]), rows[:1])  # of one sample they are the same
    for _ in range(2):
        with pytest.raises(GraddotError, match="Expected the mean over the labelled tokens"):
            run(engine, batch_of(rows), rows)
        engine.clear_gradients()


def test_arguments_that_do_not_fit_are_refused():
    model, rows = causal("Llama"), samples()
    batch = batch_of(rows)
    zeros = {n: torch.zeros_like(p) for n, p in model.named_parameters()}

    def refused(message, engine, batch=batch, ids=None, segments=LENGTHS):
        with pytest.raises(GraddotError, match=message):
            engine.attach_train_batch(batch, None, 0, ids, segments=segments)
        engine.detach()

    def given(**options):
        engine = attached(model, **options)
        engine.set_directions(zeros)
        return engine

    refused("need norms=False", given(norms=True))
    refused("need per_token=False", given(per_token=True))
    two = {k: v.view(2, -1) for k, v in batch.items()}
    refused(r"need labels of shape \(1, T\); the labels have shape \(2, 14\)", given(), two)
    refused(
        r"batch_idx has shape \(5,\); expected a sample id for each of the 6",
        given(),
        ids=torch.arange(5),
    )
    refused(
        "6 lengths with the sum 29.*no more tokens than the row's 28",
        given(),
        segments=[*LENGTHS[:5], 5],
    )
    refused(r"that of sample 1 is 0", given(), segments=[5, 0, 8])
    val = {k: v for k, v in batch.items() if k != "max_length_q"}
    refused("need given directions in place of val_data", attached(model, val))
    flash = batch_of(rows, return_flash_attn_kwargs=True)
    engine = attached(model, flash)
    engine.attach_train_batch(flash, None, 0, None)
    with pytest.raises(GraddotError, match="cu_seq_lens_k, .*of one packed row, behind which no"):
        engine.prepare_forward_input(flash)
    with pytest.raises(GraddotError, match=r"shape \(2, 14\); expected one row"):
        segment_lengths(two["position_ids"])
