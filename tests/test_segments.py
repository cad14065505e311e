"""Samples that share one row, as padding-free and packed batches have them, each against float64 with
a row of its own."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from brute_force import lm_loss, tiny_gpt2
from checked_backend import checked
from graddot_lm import GraddotError, GradDotProdEngine, fuse_head
from loop_steps import Store, attached, same_gradients
from model_zoo import VOCAB, adapters, causal, deepseek_v3, gemma3, moe, shaken
from packed_rows import (
    KEYS,
    LENGTHS,
    batch_of,
    direction_of,
    dot,
    gradients,
    labelled,
    mean_of,
    run,
    samples,
    scale,
)
from torch import nn

MODELS = {
    "gpt2": tiny_gpt2,
    "gpt2-untied": lambda: tiny_gpt2(tied=False),
    "llama": lambda: causal("Llama"),
    "llama-tied": lambda: causal("Llama", tie_word_embeddings=True),
    "qwen2": lambda: causal("Qwen2"),
    "qwen3": lambda: causal("Qwen3"),
    "mistral": lambda: causal("Mistral", sliding_window=4),
    "phi": lambda: causal("Phi"),
    "stablelm": lambda: causal("StableLm", qk_layernorm=True),  # norms of (rows, heads, T, D)
    "cohere": lambda: causal("Cohere"),  # parameters that are followed
    "gemma3": gemma3,
    "mixtral": lambda: moe("Mixtral", num_local_experts=4),
    "deepseek-v3": deepseek_v3,
    "ia3": lambda: adapters("IA3Config", feedforward_modules=["down_proj"]),
}


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("kind", MODELS)
def test_every_sample_of_a_row(close, kind, dtype, fused):
    model, rows = MODELS[kind](), samples()
    if fused and kind in ("cohere", "ia3"):
        pytest.skip("whose logits are scaled, or whose head is of another model")
    own, direction = gradients(model, rows), direction_of(model)
    model = model.to(dtype)
    engine = attached(fuse_head(model) if fused else model, label_shift="auto", per_parameter=True)
    engine.set_directions(direction)
    run(engine, batch_of(rows, return_flash_attn_kwargs=True, return_seq_idx=True), rows)
    # transformers computes losses and norms in fp32 whatever the model is
    tolerance = 1e-5 if dtype == torch.float32 else 1e-6
    for name, dots in engine.parameter_dots().items():
        close(
            dots, torch.stack([(direction[name] * g[name]).sum() for g in own]), 1e-5,
            torch.stack([direction[name].norm() * g[name].norm() for g in own]),
        )  # fmt: skip
    scores = engine.aggregate_and_log()
    assert scores.shape == (6,) and scores[1] == scores[3] == 0
    close(
        scores,
        torch.stack([dot(direction, g) for g in own]),
        tolerance,
        torch.stack([scale(direction, g) for g in own]),
    )
    whole = mean_of(rows, own)
    for n, p in model.named_parameters():
        whole.setdefault(n, torch.zeros(1))
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    same_gradients(model, whole, tolerance)


def test_a_loss_of_ones_own_and_padding_at_the_end(close):
    """In float64 throughout; two targets, a loss that is scaled, a row filled up to a multiple."""
    model, rows = tiny_gpt2().double(), samples()
    own, direction = gradients(model, rows), direction_of(model)
    other = {n: -2 * d.flip(0) for n, d in direction.items()}
    engine = attached(model)
    engine.set_directions({"a": direction, "b": other})
    batch = batch_of(rows)
    fill = {"input_ids": 0, "labels": -100, "position_ids": 0}
    batch = {k: F.pad(v, (0, 4), value=fill[k]) for k, v in batch.items()}
    engine.attach_train_batch(batch, None, 0, None, segments=torch.tensor(LENGTHS))
    x, y, positions = (batch[k] for k in ("input_ids", "labels", "position_ids"))
    loss = lm_loss(model(x, position_ids=positions, use_cache=False).logits, y)
    (engine.track_loss(loss) * 64).backward()
    engine.prepare_gradients()
    scores = engine.aggregate_and_log()
    for k, one in enumerate((direction, other)):
        want = torch.stack([dot(one, g) for g in own])
        close(scores[k], want, 1e-10, torch.stack([scale(one, g) for g in own]))
    same_gradients(model, {n: 64 * g for n, g in mean_of(rows, own).items()}, 1e-10)


def test_a_mask_keeps_samples_apart(close):
    """In place of position_ids that begin anew, as a collator of one's own may make it."""
    model, rows = tiny_gpt2().double(), samples()
    own, direction = gradients(model, rows), direction_of(model)
    batch = batch_of(rows)
    sample_of = torch.arange(6).repeat_interleave(torch.tensor(LENGTHS))
    seen = (sample_of[:, None] == sample_of).tril()
    batch["attention_mask"] = torch.zeros(1, 1, 28, 28).double().masked_fill_(~seen, -1e300)
    engine = attached(model, label_shift="auto")
    engine.set_directions(direction)
    run(engine, batch, rows)
    scales = torch.stack([scale(direction, g) for g in own])
    close(engine.aggregate_and_log(), torch.stack([dot(direction, g) for g in own]), 1e-6, scales)


def test_micro_batches_and_the_rows_of_a_store(close):
    """Packed rows of several lengths and an ordinary batch in one step, after one sample alone."""
    model = tiny_gpt2()
    optimizer, store = torch.optim.SGD(model.parameters(), lr=0.5), Store()
    micros = [samples([6], seed=2), samples([3, 8], seed=3), samples(seed=4)]
    direction = direction_of(model)
    own = [gradients(model, rows) for rows in micros]
    tokens = [[labelled(row) for row in rows] for rows in micros]
    engine = GradDotProdEngine(model, store=store)
    engine.attach(optimizer)
    engine.set_directions(direction)
    for i, rows in enumerate(micros):
        run(engine, batch_of(rows), rows, factor=1 / 3, ids=10 * i + torch.arange(len(rows)))
    want = [mean_of(rows, found) for rows, found in zip(micros, own, strict=True)]
    same_gradients(model, {n: sum(g[n] for g in want) / 3 for n in direction}, 1e-5)
    optimizer.step()
    scores = engine.aggregate_and_log()
    dots = torch.stack([dot(direction, g) for found in own for g in found])
    scales = torch.stack([scale(direction, g) for found in own for g in found])
    close(scores, dots, 1e-5, scales)
    assert store.columns["sample_id"] == [0, 10, 11, *range(20, 26)]
    assert store.columns["n_tokens"] == [n for of in tokens for n in of]
    weights = torch.tensor([n / sum(of) / 3 for of in tokens for n in of], dtype=torch.float64)
    close(store.column("value"), 0.5 * weights * dots, 1e-5, 0.5 * weights * scales)


def test_rows_of_any_length_are_checked_once(close):
    """Also where layers get (T, D), as routers and experts do."""
    model = moe("Mixtral", num_local_experts=4)
    direction, runs = direction_of(model), []
    engine = attached(model, label_shift="auto")
    engine.set_directions(direction)
    model.register_forward_pre_hook(lambda *_: runs.append(0))
    for step, lengths in enumerate([LENGTHS, [4, 5, 4], [6, 2, 8]]):
        rows = samples(lengths, seed=step)
        own = gradients(model, rows)
        runs.clear()
        run(engine, batch_of(rows), rows, step=step)
        assert (len(runs) == 1) == (step > 0)
        scales = torch.stack([scale(direction, g) for g in own])
        close(
            engine.aggregate_and_log(), torch.stack([dot(direction, g) for g in own]), 1e-5, scales
        )


def test_num_items_in_batch(close):
    model, rows = causal("Llama"), samples()
    own, direction = gradients(model, rows), direction_of(model)
    optimizer, store = torch.optim.SGD(model.parameters(), lr=0.5), Store()
    engine = GradDotProdEngine(model, store=store)
    engine.attach(optimizer)
    engine.set_directions(direction)
    batch = batch_of(rows)
    engine.attach_train_batch(batch, None, 0, torch.arange(6), segments=LENGTHS)
    model(**batch, use_cache=False, num_items_in_batch=40).loss.backward()
    engine.prepare_gradients()
    tokens = torch.tensor([labelled(row) for row in rows], dtype=torch.float64)
    same_gradients(model, {n: g * tokens.sum() / 40 for n, g in mean_of(rows, own).items()}, 1e-5)
    optimizer.step()
    dots = torch.stack([dot(direction, g) for g in own])
    scales = torch.stack([scale(direction, g) for g in own])
    close(engine.aggregate_and_log(), dots, 1e-5, scales)
    close(store.column("value"), 0.5 * tokens / 40 * dots, 1e-5, 0.5 * tokens / 40 * scales)


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
def test_under_autocast(close, fused):
    model, rows = causal("Llama"), samples()
    own, direction = gradients(model, rows), direction_of(model)
    engine = attached(fuse_head(model) if fused else model, label_shift="auto")
    engine.set_directions(direction)
    with torch.autocast("cpu", torch.bfloat16):
        run(engine, batch_of(rows), rows)
    scales = torch.stack([scale(direction, g) for g in own])
    close(
        engine.aggregate_and_log(), torch.stack([dot(direction, g) for g in own]), 2e-2, 10 * scales
    )


@pytest.mark.parametrize("reentrant", [True, False])
def test_with_activation_checkpointing(close, reentrant):
    model, rows = causal("Qwen2"), samples()
    own, direction = gradients(model, rows), direction_of(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    engine = attached(model.train(), label_shift="auto")
    engine.set_directions(direction)
    run(engine, batch_of(rows), rows)
    scales = torch.stack([scale(direction, g) for g in own])
    close(engine.aggregate_and_log(), torch.stack([dot(direction, g) for g in own]), 1e-5, scales)


def test_compiled(close):
    """Rows of other lengths run in the graph of the first."""
    model = tiny_gpt2(layers=1)
    direction = direction_of(model)
    engine = attached(model, label_shift="auto")
    engine.set_directions(direction)
    plain, engine.model = engine.model, torch.compile(model, backend=checked, dynamic=True)
    for step, lengths in enumerate([LENGTHS, [4, 5, 4], [6, 2, 4, 8]]):
        rows = samples(lengths, seed=step)
        own = gradients(plain, rows)
        run(engine, batch_of(rows), rows, step=step)
        scales = torch.stack([scale(direction, g) for g in own])
        close(
            engine.aggregate_and_log(), torch.stack([dot(direction, g) for g in own]), 1e-5, scales
        )
        same_gradients(plain, mean_of(rows, own), 1e-5)
        plain.zero_grad()


class HeadsFirst(nn.Module):
    """All kinds of layers on (rows, heads, T, D)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.pairs, self.head = (
            nn.Embedding(VOCAB, 24), nn.Embedding(7, 8), nn.Linear(24, VOCAB),
        )  # fmt: skip
        self.norm, self.inner = nn.LayerNorm(8), nn.Linear(8, 8)
        self.scale = nn.RMSNorm(8)

    def forward(self, ids, **kwargs):
        x = self.table(ids).unflatten(2, (3, 8)).transpose(1, 2)
        x = self.norm(x + self.pairs(torch.stack([ids % 7, ids % 5, ids % 3], 1)))
        x = self.scale(self.inner(x)).transpose(1, 2).flatten(2)
        return SimpleNamespace(logits=self.head(x))


def test_heads_before_tokens(close):
    model, rows = shaken(HeadsFirst()).double(), samples()
    own, direction = gradients(model, rows), direction_of(model)
    engine = attached(model, per_parameter=True)
    engine.set_directions(direction)
    batch = batch_of(rows)
    engine.attach_train_batch(batch["input_ids"], batch["labels"], 0, None, segments=LENGTHS)
    loss = lm_loss(model(batch["input_ids"]).logits, batch["labels"])
    engine.track_loss(loss).backward()
    engine.prepare_gradients()
    for name, dots in engine.parameter_dots().items():
        want = torch.stack([(direction[name] * g[name]).sum() for g in own])
        close(dots, want, 1e-9, torch.stack([direction[name].norm() * g[name].norm() for g in own]))
    same_gradients(model, mean_of(rows, own), 1e-10)
    engine.aggregate_and_log()
    engine.attach_train_batch(*(batch[k][:, :3] for k in KEYS), 1, None, segments=[3])
    with pytest.raises(GraddotError, match="is used otherwise than on the 3 tokens"):  # or 3 heads
        engine.track_loss(model(batch["input_ids"][:, :3]).logits.square().mean()).backward()
