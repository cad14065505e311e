"""Samples that share one row, as padding-free and packed batches have them, each against float64 with
a row of its own."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from brute_force import lm_loss, tiny_gpt2, token_batch
from graddot_lm import GraddotError, GradDotProdEngine, fuse_head, segment_lengths
from loop_steps import Store, attached, same_gradients
from model_zoo import VOCAB, adapters, causal, deepseek_v3, gemma3, moe, shaken
from process_group import on_processes
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import DataCollatorWithFlattening
from transformers.modeling_outputs import CausalLMOutput

LENGTHS, KEYS = [5, 1, 7, 2, 9, 4], ("input_ids", "labels")


def samples(lengths=LENGTHS, *, seed=1):
    """Of several lengths; the labels of the third are half a prompt, and the fourth has none."""
    ids, labels = token_batch(len(lengths), max(lengths), VOCAB, seed=seed)
    rows = [(ids[i, :n].clone(), labels[i, :n].clone()) for i, n in enumerate(lengths)]
    for i, (_, own) in enumerate(rows):
        own[: {2: 4, 3: 2}.get(i, 0)] = -100
    return [{"input_ids": x.tolist(), "labels": y.tolist()} for x, y in rows]


def batch_of(rows, **options):
    return DataCollatorWithFlattening(**options)(rows)


def gradients(model, rows):
    """Of every sample's own mean loss, fp64; zeros where it has no labelled token."""
    exact, found = copy.deepcopy(model).double(), []
    for row in rows:
        exact.zero_grad()
        x, y = (torch.tensor([row[k]]) for k in KEYS)
        total = F.cross_entropy(
            exact(x).logits[:, :-1].flatten(0, 1), y[:, 1:].flatten(), reduction="sum"
        )
        (total / max(1, labelled(row))).backward()
        grad = lambda p: torch.zeros_like(p) if p.grad is None else p.grad.clone()  # of experts
        found.append({n: grad(p) for n, p in exact.named_parameters() if p.requires_grad})
    return found


def labelled(row):
    return sum(y != -100 for y in row["labels"][1:])


def dot(direction, gradient):
    return sum((direction[n] * gradient[n]).sum() for n in direction)


def scale(direction, gradient):
    norm = lambda g: torch.stack([x.norm() for x in g.values()]).norm()
    return norm(direction) * norm(gradient)


def direction_of(model, seed=9):
    """A gradient of other rows."""
    own = gradients(model, samples([8, 6], seed=seed))
    return {n: (own[0][n] + own[1][n]) / 2 for n in own[0]}


def mean_of(rows, found):
    """The gradient of the mean over all labelled tokens."""
    counts = [labelled(row) for row in rows]
    parts = zip(counts, found, strict=True)
    whole = [{n: count * g for n, g in own.items()} for count, own in parts]
    return {n: sum(own[n] for own in whole) / sum(counts) for n in whole[0]}


def run(engine, batch, rows, *, factor=1.0, step=0, ids=None):
    ids = torch.arange(len(rows)) if ids is None else ids
    lengths = segment_lengths(batch["position_ids"])
    engine.attach_train_batch(batch, None, step, ids, segments=lengths)
    inputs, _ = engine.prepare_forward_input(batch)
    (engine.model(**inputs, use_cache=False).loss * factor).backward()
    engine.prepare_gradients()


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
    plain, engine.model = engine.model, torch.compile(model, backend="aot_eager", dynamic=True)
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


# What cannot be scored


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
