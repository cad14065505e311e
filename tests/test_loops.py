"""Loops as people write them: batches, accumulation, given directions, AMP, checkpoints, clipping.

All against the float64 brute force, one backward a sample. Losses of transformers models are
computed in fp32 whatever the model's dtype, which bounds the tests that use them to 1e-5.
"""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from brute_force import gradient, lm_loss, sample_dots, tiny_gpt2, token_batch, total
from graddot_lm import GraddotError, GradDotProdEngine, adamw_direction
from test_engine import SharedEverything
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForSequenceClassification


@pytest.fixture
def close(record_property):
    """Largest error of dots, relative to them or to a tenth of their Cauchy-Schwarz scale."""

    def check(got, want, tolerance, scale=None):
        bound = want.abs() if scale is None else torch.maximum(want.abs(), 0.1 * scale)
        error = ((got.double() - want).abs() / bound.clamp(min=1e-30)).max().item()
        record_property("relative_error", error)
        assert error <= tolerance, f"relative error {error:.1e} > {tolerance:.0e}"

    return check


class Store:
    """Keeps the rows, column by column."""

    def __init__(self):
        self.columns = {}

    def append(self, rows, step):
        for name, values in rows.items():
            self.columns.setdefault(name, []).extend(torch.as_tensor(values).tolist())

    def column(self, name):
        return torch.tensor(self.columns.pop(name), dtype=torch.float64)


def run(engine, train, step=0, *, loss=lm_loss, factor=1.0):
    """One micro-batch of a loop with a loss of its own, up to prepare_gradients."""
    engine.attach_train_batch(*train, step, torch.arange(len(train[1])))
    x, y = engine.prepare_forward_input(*train)
    out = engine.model(x)
    (engine.track_loss(loss(getattr(out, "logits", out), y)) * factor).backward()
    engine.prepare_gradients()


def attached(model, val=None, optimizer=None, **kwargs):
    engine = GradDotProdEngine(model, val, **{"label_shift": 1, **kwargs})
    engine.attach(optimizer)
    return engine


def same_gradients(model, want, tolerance):
    # Gradients that are zero but for rounding, as of BERT's key biases, have no relative accuracy.
    whole = torch.stack([g.norm() for g in want.values()]).norm()
    for name, p in model.named_parameters():
        error = (p.grad.double() - want[name]).norm() / (want[name].norm() + 1e-3 * whole)
        assert error <= tolerance, name


# Batches


def padded(rows, lengths, *, seed, vocab=61, pad=0):
    """A collated batch: input_ids, attention_mask and labels, -100 on the padding."""
    ids, labels = token_batch(rows, max(lengths), vocab, seed=seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids[~mask], labels[~mask] = pad, -100
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def mapping_gradient(model, batch):
    exact = copy.deepcopy(model).double()
    exact.zero_grad()
    exact(**batch).loss.backward()
    return {n: p.grad.clone() for n, p in exact.named_parameters() if p.grad is not None}


def mapping_dots(model, train, val):
    """Scores and their scale by brute force; every row is cut to its own length, without mask."""
    direction, dots, scales = mapping_gradient(model, val), [], []
    norm = torch.stack([d.norm() for d in direction.values()]).norm()
    for i in range(len(train["labels"])):
        n = int(train["attention_mask"][i].sum())
        row = {k: v[i : i + 1, :n] if v.dim() > 1 else v[i : i + 1] for k, v in train.items()}
        row.pop("attention_mask")
        own = mapping_gradient(model, row)
        dots.append(sum((direction[n] * own[n]).sum() for n in direction))
        scales.append(norm * torch.stack([g.norm() for g in own.values()]).norm())
    return torch.stack(dots), torch.stack(scales)


def run_mapping(engine, train, labels_inside):
    x, y = dict(train), None
    if not labels_inside:
        y = x.pop("labels")
    engine.attach_train_batch(x, y, 0, None)
    inputs, labels = engine.prepare_forward_input(x, y)
    kwargs = inputs if labels_inside else {**inputs, "labels": labels}
    engine.model(**kwargs).loss.backward()
    engine.prepare_gradients()
    return engine.aggregate_and_log()


@pytest.mark.parametrize("labels_inside", [True, False], ids=["inside", "beside"])
def test_mappings_of_any_size_and_length(close, labels_inside):
    model = tiny_gpt2().double()
    val = padded(2, [9, 6], seed=2)
    fill = {"input_ids": 60, "attention_mask": 0}
    given = (
        val if labels_inside else ({k: v for k, v in val.items() if k != "labels"}, val["labels"])
    )
    engine = GradDotProdEngine(model, given, padding=fill)
    engine.attach()
    for seed, lengths in enumerate([[9, 5, 9], [4, 3], [15, 11, 7, 2], [9]]):
        train = padded(len(lengths), lengths, seed=seed)
        want, scale = mapping_dots(model, train, val)
        model.zero_grad()
        close(run_mapping(engine, train, labels_inside), want, 1e-5, scale)
        same_gradients(model, mapping_gradient(model, train), 1e-5)


def tiny_bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=61,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        num_labels=3,
        hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
    )
    return BertForSequenceClassification(config).double()


def test_attention_mask_of_a_bidirectional_model(close):
    model = tiny_bert()
    batches = [padded(3, [9, 5, 7], seed=1), padded(2, [6, 4], seed=2)]
    for batch in batches:
        batch["labels"] = torch.arange(len(batch["labels"])) % 3
    train, val = batches
    want, scale = mapping_dots(model, train, val)
    fill = {"input_ids": 0, "attention_mask": 0}
    engine = GradDotProdEngine(model, val, padding=fill)
    engine.attach()
    close(run_mapping(engine, train, True), want, 1e-10, scale)
    same_gradients(model, mapping_gradient(model, train), 1e-10)


def test_tensors_of_another_length_are_filled_up(close):
    model = tiny_gpt2().double()
    train, val = token_batch(3, 15, seed=1), token_batch(2, 9, seed=2)
    dots, scales = sample_dots(model, train, val)
    engine = attached(model, val, padding={"inputs": 0})
    run(engine, train)
    close(engine.aggregate_and_log(), total(dots), 1e-10, total(scales))


def test_batches_that_cannot_be_joined_are_refused():
    model, val = tiny_gpt2(), padded(2, [9, 6], seed=2)
    with pytest.raises(GraddotError, match="no labels"):
        GradDotProdEngine(model, {"a": {"input_ids": val["input_ids"]}})
    engine = GradDotProdEngine(model, val)
    engine.attach()
    train = padded(2, [5, 5], seed=1)
    with pytest.raises(GraddotError, match=r"of labels have shape \(5,\).*padding="):
        engine.attach_train_batch(train, None, 0, None)
    with pytest.raises(GraddotError, match="3 attention_mask and 2 labels"):
        mask = torch.ones(3, 5)
        engine.attach_train_batch({**train, "attention_mask": mask}, None, 0, None)
    engine.detach()
    engine = GradDotProdEngine(model, val, padding={"input_ids": 0})
    engine.attach()
    engine.attach_train_batch(train, None, 0, None)
    with pytest.raises(GraddotError, match=r"rows of attention_mask have shape \(5,\)"):
        engine.prepare_forward_input(train)
    with pytest.raises(GraddotError, match="training rows are a tensor, validation rows a mapping"):
        engine.prepare_forward_input(train["input_ids"], train["labels"])


def test_padding_without_a_mask_is_refused():
    model = tiny_gpt2()
    train, val = padded(2, [5, 5], seed=1), padded(2, [9, 6], seed=2)
    del train["attention_mask"], val["attention_mask"]
    engine = GradDotProdEngine(model, val, padding={"input_ids": 0})
    engine.attach()
    engine.attach_train_batch(train, None, 0, None)
    with pytest.raises(GraddotError, match="need an attention_mask"):
        engine.prepare_forward_input(train)


# Given directions


def loss_of_logits(model, x, y):
    return lm_loss(model(x).logits, y)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_directions_of_a_large_validation_set(close, tied, dtype):
    """Several batches of unequal, ragged rows: the mean over all their labelled tokens."""
    model = tiny_gpt2(tied=tied)
    train = token_batch(5, 15, seed=1, ragged=True)
    vals = [token_batch(2, 15, seed=2, ragged=True), token_batch(3, 11, seed=3)]
    tokens = [(y[:, 1:] != -100).sum() for _, y in vals]
    dots, scales = zip(*[sample_dots(model, train, val) for val in vals], strict=True)
    mean = lambda parts: sum(n * total(p) for n, p in zip(tokens, parts, strict=True)) / sum(tokens)
    model = model.to(dtype)
    engine = attached(model, per_parameter=True)
    model.lm_head.weight.grad = kept = torch.ones_like(model.lm_head.weight)
    engine.set_directions(engine.compute_directions(vals, loss_of_logits))
    assert model.lm_head.weight.grad is kept and (kept == 1).all()
    model.zero_grad()
    run(engine, train)
    close(
        total(engine.parameter_dots()),
        mean(dots),
        1e-5 if dtype == torch.float32 else 1e-10,
        mean(scales),
    )
    engine.aggregate_and_log()
    same_gradients(model, gradient(model, *train), 1e-5 if dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize("make", [tiny_gpt2, SharedEverything], ids=["gpt2", "several_uses"])
def test_riding_along_and_given_directions_agree(close, make):
    model = make().double()
    train = token_batch(4, 15, 30, seed=1, ragged=True)
    vals = {"a": token_batch(1, 15, 30, seed=2), "b": token_batch(3, 15, 30, seed=3, ragged=True)}
    engine = attached(model, vals)
    run(engine, train)
    riding = engine.aggregate_and_log()
    engine.detach()
    engine = attached(model)
    loss = lambda model, x, y: lm_loss(getattr(out := model(x), "logits", out), y)
    directions = engine.compute_directions({k: [v] for k, v in vals.items()}, loss)
    engine.set_directions(directions)
    for factor in (1.0, 512.0):
        run(engine, train, factor=factor)
        close(engine.aggregate_and_log(), riding, 1e-10)
    engine.set_directions(directions["b"])
    run(engine, train)
    close(engine.aggregate_and_log(), riding[1], 1e-10)


def test_directions_leave_excluded_parameters_alone(close):
    model = tiny_gpt2(tied=False).double()
    train, val = token_batch(3, 15, seed=1), token_batch(1, 15, seed=2)
    names = ["lm_head.weight", "transformer.wte.weight", "transformer.ln_f.bias"]
    dots, _ = sample_dots(model, train, val)
    engine = attached(model, exclude=names)
    model.zero_grad()
    engine.set_directions(engine.compute_directions([val], loss_of_logits))
    run(engine, train)
    close(
        engine.aggregate_and_log(), total({n: d for n, d in dots.items() if n not in names}), 1e-10
    )
    same_gradients(model, gradient(model, *train), 1e-10)


@pytest.mark.parametrize("loss_scale", [1.0, 2.0**13, 2.0**40], ids=["1", "2^13", "2^40"])
def test_loss_scale_of_an_fp16_validation_gradient(record_property, loss_scale):
    """A loss so small that its fp16 gradients would be zero; a scale that overflows."""
    model, val = tiny_gpt2(), token_batch(2, 15, seed=2)
    want = gradient(model, *val)
    engine = attached(model)
    tiny = lambda model, x, y: loss_of_logits(model, x, y) * 2.0**-20
    with torch.autocast("cpu", torch.float16):
        got = engine.compute_directions([val], tiny, loss_scale=loss_scale)
    whole = lambda grads: torch.cat([grads[n].double().flatten() for n in want])
    error = ((whole(got) * 2.0**20 - whole(want)).norm() / whole(want).norm()).item()
    record_property("relative_error", error)
    assert error > 0.1 if loss_scale == 1 else error <= 1e-2


def test_directions_that_do_not_fit_are_refused():
    model, train = tiny_gpt2(), token_batch(2, 9, seed=1)
    engine = attached(model)
    with pytest.raises(GraddotError, match="no direction"):
        engine.attach_train_batch(*train, 0, None)
    good = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    with pytest.raises(GraddotError, match=r"lacks \['transformer.ln_f.bias'\] and has \['x'\]"):
        engine.set_directions(
            {**{n: g for n, g in good.items() if "ln_f.b" not in n}, "x": torch.zeros(1)}
        )
    bad = {**good, "transformer.ln_f.bias": torch.zeros(3)}
    with pytest.raises(
        GraddotError, match=r"shape \(3,\) for transformer.ln_f.bias; expected \(24,"
    ):
        engine.set_directions(bad)
    with pytest.raises(GraddotError, match="no labelled token"):
        engine.compute_directions([(train[0], torch.full_like(train[1], -100))], loss_of_logits)
    engine.set_directions(good)
    run(engine, train)
    with pytest.raises(GraddotError, match="under way"):
        engine.set_directions(good)
    with pytest.raises(GraddotError, match="ride along"):
        GradDotProdEngine(model, train).set_directions(good)


@pytest.mark.parametrize("around", ["zero", "gradient"])
def test_adamw_direction_predicts_the_next_step(close, around):
    """d(val loss after AdamW's step) / d(weight of sample i), by finite differences."""
    model = tiny_gpt2().double()
    train, val = token_batch(3, 15, seed=1, ragged=True), token_batch(2, 15, seed=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    for seed in (5, 6, 7):
        lm_loss(
            model(token_batch(4, 15, seed=seed)[0]).logits, token_batch(4, 15, seed=seed)[1]
        ).backward()
        optimizer.step()
        optimizer.zero_grad()
    parameters = dict(model.named_parameters())
    base = gradient(model, *train) if around == "gradient" else None
    own = [gradient(model, train[0][i : i + 1], train[1][i : i + 1]) for i in range(3)]
    # Every entry of the second moment above zero: embedding rows not met so far have no slope.
    for p in parameters.values():
        optimizer.state[p]["exp_avg_sq"].add_(1e-8)
    engine = attached(model)
    direction = engine.compute_directions([val], loss_of_logits)
    engine.set_directions(adamw_direction(optimizer, parameters, direction, base))
    run(engine, train)
    scores = engine.aggregate_and_log()
    engine.detach()

    def val_loss(lr, i, h):
        moved = copy.deepcopy(model)
        twin = torch.optim.AdamW(moved.parameters(), lr=1e-3, weight_decay=0.1)
        twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        twin.param_groups[0]["lr"] = lr
        for name, p in moved.named_parameters():
            p.grad = h * own[i][name] + (0 if base is None else base[name])
        twin.step()
        return lm_loss(moved(val[0]).logits, val[1]).item()

    def slope(lr, i, h=1e-4):
        return (val_loss(lr, i, -h) - val_loss(lr, i, h)) / (2 * h * lr)

    # Richardson: what is left after central differences in h is linear in lr.
    slopes = torch.tensor([2 * slope(2e-6, i) - slope(4e-6, i) for i in range(3)])
    close(scores, slopes.double(), 1e-3)


def test_adamw_direction_refusals():
    model = tiny_gpt2()
    parameters = dict(model.named_parameters())
    zeros = {n: torch.zeros_like(p) for n, p in parameters.items()}
    with pytest.raises(GraddotError, match="SGD"):
        adamw_direction(torch.optim.SGD(model.parameters(), lr=1.0), parameters, zeros)
    with pytest.raises(GraddotError, match="no state"):
        adamw_direction(torch.optim.AdamW(model.parameters()), parameters, zeros)
    with pytest.raises(GraddotError, match="amsgrad"):
        optimizer = torch.optim.AdamW(model.parameters(), amsgrad=True)
        adamw_direction(optimizer, parameters, zeros)


def token_parts(model, direction, row, labels):
    """⟨direction, gradient⟩ by token, (T,), float64: every use of a weight in a linear layer,
    embedding or norm gets a copy of it for every token, whose gradient is that token's part."""
    copies = []

    def by_token(name, rows):
        own = dict(model.named_parameters())[name]
        copy_of = own.detach().expand(rows, *own.shape).clone().requires_grad_()
        copies.append((name, copy_of))
        return copy_of

    def forward_of(prefix, module):
        names = {k: f"{prefix}.{k}" for k, _ in module.named_parameters()}
        if prefix == "lm_head":
            names["weight"] = "transformer.wte.weight"

        def forward(x):
            w = by_token(names["weight"], x.shape[1])
            b = by_token(names["bias"], x.shape[1]) if "bias" in names else 0
            if isinstance(module, nn.Embedding):
                return w[torch.arange(x.shape[1]), x[0]][None]
            if isinstance(module, nn.LayerNorm):
                return F.layer_norm(x, x.shape[-1:], eps=module.eps) * w + b
            if isinstance(module, nn.Linear):
                return torch.einsum("btd,tod->bto", x, w) + b
            return torch.einsum("btd,tdo->bto", x, w) + b

        return forward

    plain = copy.deepcopy(model)
    for prefix, module in plain.named_modules():
        if len(list(module.children())) == 0 and len(list(module.parameters())) > 0:
            module.forward = forward_of(prefix, module)
    lm_loss(plain(row).logits, labels).backward()
    parts = [(c.grad * direction[name]).flatten(1).sum(1) for name, c in copies]
    return torch.stack(parts).sum(0)


def test_dots_by_token(close):
    """Against a copy of every weight for every token; in the sum, the scores."""
    model = tiny_gpt2().double()
    micros = [token_batch(2, 9, seed=1, ragged=True), token_batch(1, 7, seed=3)]
    val = token_batch(2, 15, seed=2)
    direction = gradient(model, *val)
    rows = [(x[i : i + 1], y[i : i + 1]) for x, y in micros for i in range(len(x))]
    want = [
        F.pad(p, (0, 9 - len(p))) for p in (token_parts(model, direction, *row) for row in rows)
    ]
    want = torch.stack(want)
    engine = attached(model, per_token=True)
    engine.set_directions({"a": direction, "b": {n: 2 * d for n, d in direction.items()}})
    for micro in micros:
        run(engine, micro, factor=0.5)
    dots = engine.token_dots()
    assert dots.shape == (2, 3, 9)
    scale = want.norm(dim=1, keepdim=True).expand(3, 9)
    close(dots[0], want, 1e-10, scale)
    close(dots[1], 2 * want, 1e-10, scale)
    close(engine.aggregate_and_log()[0], want.sum(1), 1e-10)
    grads = [gradient(model, *micro) for micro in micros]
    same_gradients(model, {n: sum(g[n] for g in grads) / 2 for n in grads[0]}, 1e-10)


def test_dots_by_token_that_do_not_exist_are_refused():
    model = tiny_bert().float()
    batch = padded(3, [9, 9, 9], seed=1)
    with pytest.raises(GraddotError, match="per_token needs given directions"):
        GradDotProdEngine(model, batch, per_token=True)
    engine = GradDotProdEngine(model, per_token=True)
    engine.attach()
    engine.set_directions({n: torch.zeros_like(p) for n, p in model.named_parameters()})
    with pytest.raises(GraddotError, match=r"labels of shape \(N, T\), not \(3,\)"):
        engine.attach_train_batch({**batch, "labels": torch.arange(3)}, None, 0, None)
    engine.attach_train_batch(batch, None, 0, None)
    batch.pop("labels")
    with pytest.raises(GraddotError, match="classifier.bias is used on 3 tokens of 3 rows; exp"):
        model(**batch).logits.sum().backward()


# Values


@pytest.mark.parametrize("weighting", ["tokens", "equal"])
def test_values_of_accumulated_clipped_steps(close, weighting):
    """What the val loss gains if the sample's gradient is left out of the SGD step, two lrs."""
    model = tiny_gpt2().double()
    micros = [token_batch(n, 15, seed=n, ragged=True) for n in (3, 2)]
    val, store = token_batch(2, 15, seed=9), Store()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    groups = [
        {"params": matrices, "lr": 1e-5},
        {"params": [p for p in model.parameters() if p.dim() == 1], "lr": 4e-5},
    ]
    optimizer = torch.optim.SGD(groups)
    tokens = [(y[:, 1:] != -100).sum(1) for _, y in micros]
    counts = [int(n.sum()) for n in tokens]
    factors = [n / sum(counts) if weighting == "tokens" else 0.5 for n in counts]
    engine, before = attached(model, val, optimizer, store=store), copy.deepcopy(model)
    for micro, factor in zip(micros, factors, strict=True):
        run(engine, micro, factor=factor)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    clip = min(1.0, 0.5 / (norm.item() + 1e-6))
    assert clip < 1
    lrs = {n: 1e-5 if p.dim() > 1 else 4e-5 for n, p in model.named_parameters()}
    optimizer.step()
    engine.aggregate_and_log(gradient_scale=clip)
    after, changes = copy.deepcopy(model), []
    reached = lm_loss(after(val[0]).logits, val[1]).item()
    for (x, y), factor, n, own_tokens in zip(micros, factors, counts, tokens, strict=True):
        for i in range(len(x)):
            own = gradient(before, x[i : i + 1], y[i : i + 1])
            weight = clip * factor * own_tokens[i].item() / n
            with torch.no_grad():
                for name, p in after.named_parameters():
                    p.copy_(model.get_parameter(name) + lrs[name] * weight * own[name])
            changes.append(lm_loss(after(val[0]).logits, val[1]).item() - reached)
    close(store.column("value"), torch.tensor(changes, dtype=torch.float64), 2e-3)


def test_value_with_num_items_in_batch(close):
    """transformers' sum over the tokens of all micro-batches: gradient, scores and weights."""
    model, store = tiny_gpt2(), Store()
    micros = [token_batch(n, 15, seed=n, ragged=True) for n in (3, 2)]
    val = token_batch(2, 15, seed=9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    items = sum((y[:, 1:] != -100).sum() for _, y in micros)
    want = [sample_dots(model, micro, val) for micro in micros]
    dots, scales = (torch.cat([total(w[k]) for w in want]) for k in (0, 1))
    train = torch.cat([x for x, _ in micros]), torch.cat([y for _, y in micros])
    want_grad, share = gradient(model, *train), (train[1][:, 1:] != -100).sum(1) / items
    engine = GradDotProdEngine(model, val, store=store)
    engine.attach(optimizer)
    for x, y in micros:
        engine.attach_train_batch(x, y, 0, torch.arange(len(x)))
        x, y = engine.prepare_forward_input(x, y)
        (model(x, labels=y, num_items_in_batch=items).loss * 8).backward()
        engine.prepare_gradients()
    for p in model.parameters():
        p.grad /= 8
    same_gradients(model, want_grad, 1e-5)
    optimizer.step()
    close(engine.aggregate_and_log(), dots, 1e-5, scales)
    close(store.column("value"), 0.5 * share * dots, 1e-5, 0.5 * share * scales)


def test_a_step_after_its_values_is_refused():
    model, val = tiny_gpt2(), token_batch(1, 9, seed=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    engine = attached(model, val, optimizer, store=Store())
    run(engine, token_batch(2, 9, seed=1))
    engine.aggregate_and_log()
    with pytest.raises(GraddotError, match="came after aggregate_and_log"):
        optimizer.step()
    run(engine, token_batch(2, 9, seed=1))
    engine.aggregate_and_log()  # as if a GradScaler had skipped the step
    lm_loss(model(val[0]).logits, val[1]).backward()
    optimizer.step()  # of a step without scores
    with pytest.raises(GraddotError, match="updates none"):
        GradDotProdEngine(tiny_gpt2(), val).attach(optimizer)


# Mixed precision


@pytest.mark.parametrize("given", [False, True], ids=["riding", "given"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_with_grad_scaler(record_property, dtype, given):
    """Scores within 2e-2 of their Cauchy-Schwarz scale, as in 16 bit elsewhere."""
    model = tiny_gpt2()
    train, val = token_batch(5, 31, seed=1, ragged=True), token_batch(2, 31, seed=2)
    dots, scales = sample_dots(model, train, val)
    optimizer, store = torch.optim.SGD(model.parameters(), lr=0.1), Store()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    engine = attached(model, None if given else val, optimizer, store=store)
    with torch.autocast("cpu", dtype):
        if given:
            engine.set_directions(engine.compute_directions([val], loss_of_logits))
        engine.attach_train_batch(*train, 0, torch.arange(5))
        x, y = engine.prepare_forward_input(*train)
        loss = engine.track_loss(lm_loss(model(x).logits.float(), y))
    scaler.scale(loss).backward()
    engine.prepare_gradients()
    scaler.unscale_(optimizer)
    want_grad = gradient(model, *train)
    scaler.step(optimizer)
    scaler.update()
    error = ((engine.aggregate_and_log() - total(dots)).abs() / total(scales)).max().item()
    record_property("relative_error", error)
    assert error <= 2e-2
    whole = lambda grads: torch.cat([g.double().flatten() for g in grads])
    got = whole([p.grad for p in model.parameters()])
    want = whole([want_grad[n] for n, _ in model.named_parameters()])
    assert (got - want).norm() <= 2e-2 * want.norm()
    share = (train[1][:, 1:] != -100).sum(1) / (train[1][:, 1:] != -100).sum()
    want_value = 0.1 * share * torch.tensor(store.columns["dot"], dtype=torch.float64)
    assert torch.allclose(store.column("value"), want_value, rtol=1e-6)


@pytest.mark.parametrize("fused", [False, True], ids=["hook", "fused"])
def test_a_skipped_step_has_no_value(fused):
    model, val, store = tiny_gpt2(), token_batch(1, 9, seed=2), Store()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    engine = attached(model, val, optimizer, store=store)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for step, factor in enumerate([1.0, float("inf"), 1.0]):
        before = model.lm_head.weight.clone()
        engine.attach_train_batch(*token_batch(2, 9, seed=step), step, torch.arange(2))
        x, y = engine.prepare_forward_input(*token_batch(2, 9, seed=step))
        scaler.scale(engine.track_loss(lm_loss(model(x).logits, y)) * factor).backward()
        engine.prepare_gradients()
        scaler.step(optimizer)
        scaler.update()
        engine.aggregate_and_log()
        optimizer.zero_grad()
        applied = not torch.equal(before, model.lm_head.weight)
        assert applied == (step != 1)
        values = store.column("value")
        assert (values != 0).all() if applied else (values == 0).all()


# Activation checkpointing

KINDS = pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])


@KINDS
@pytest.mark.parametrize("given", [False, True], ids=["riding", "given"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_gradient_checkpointing_of_gpt2(close, reentrant, given, tied):
    model = tiny_gpt2(tied=tied).double()
    train, val = token_batch(4, 15, seed=1, ragged=True), token_batch(2, 15, seed=2)
    dots, scales = sample_dots(model, train, val)
    want_grad = gradient(model, *train)
    kwargs = {"use_reentrant": reentrant}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    engine = attached(model, None if given else val)
    if given:
        engine.set_directions(engine.compute_directions([val], loss_of_logits))
    for _ in range(2):
        model.zero_grad()
        run(engine, train)
        close(engine.aggregate_and_log(), total(dots), 1e-10, total(scales))
        same_gradients(model, want_grad, 1e-10)


class Checkpointed(SharedEverything):
    """Embeddings, shared layers and head inside checkpoints, one nested; equal ids twice."""

    reentrant = False

    def forward(self, ids):
        again = lambda *args: checkpoint(*args, use_reentrant=self.reentrant)
        # A reentrant checkpoint passes gradients on only if one of its inputs needs them.
        handle = torch.zeros((), requires_grad=True)
        look = lambda ids, handle: self.source(ids) + 0.5 * self.target((7 * ids + 1) % 30) + handle
        x = again(look, ids, handle) + again(look, ids, handle)
        mix = lambda x: torch.tanh(self.mix(self.norm(x)))
        x = again(lambda x: again(mix, x), again(mix, x))
        return again(self.head, x)


@KINDS
def test_checkpoints_around_parameters_with_several_uses(close, reentrant):
    model = Checkpointed()
    train, val = token_batch(5, 11, 30, seed=6), token_batch(2, 11, 30, seed=7)
    dots, scales = sample_dots(model, train, val)
    want_grad = gradient(model, *train)
    model = model.double()
    model.reentrant = reentrant
    engine = attached(model, val, per_parameter=True)
    run(engine, train)
    for name, got in engine.parameter_dots().items():
        close(got, dots[name], 1e-10, scales[name])
    same_gradients(model, want_grad, 1e-10)


class Borrowed(nn.Module):
    """Reads a layer's weight behind its back, inside a checkpoint."""

    def __init__(self):
        super().__init__()
        self.first, self.linear = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        inside = lambda x: torch.tanh(self.linear(x)) @ self.linear.weight
        return checkpoint(inside, self.first(x), use_reentrant=True)


def test_a_weight_used_behind_the_layers_back_in_a_checkpoint_is_refused():
    y = torch.arange(3) % 4
    engine = attached(Borrowed(), (torch.randn(2, 4), y[:2]), label_shift=0)
    with pytest.raises(GraddotError, match="linear.weight, inside a reentrant checkpoint"):
        run(engine, (torch.randn(3, 4), y), loss=F.cross_entropy)


def test_the_whole_model_in_a_checkpoint(close):
    model = tiny_gpt2().double()
    train, val = token_batch(3, 15, seed=1), token_batch(2, 15, seed=2)
    dots, scales = sample_dots(model, train, val)
    for reentrant in (False, True):
        engine = attached(model, val)
        engine.attach_train_batch(*train, 0, None)
        x, y = engine.prepare_forward_input(*train)
        handle = torch.zeros((), requires_grad=True)
        logits = checkpoint(
            lambda x, handle: model(x).logits + handle, x, handle, use_reentrant=reentrant
        )
        refused = pytest.raises(GraddotError, match="the whole model runs inside a reentrant")
        with refused if reentrant else contextlib.nullcontext():
            lm_loss(logits, y).backward()
        if not reentrant:
            engine.prepare_gradients()
            close(engine.aggregate_and_log(), total(dots), 1e-10, total(scales))
        engine.detach()


def saved_bytes(model, run):
    """Bytes that the forward leaves for the backward, each memory counted once."""
    seen = {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in held:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    held = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = run()  # kept alive, so that no memory is counted for two tensors
    del output
    return sum(seen.values())


@KINDS
def test_checkpointing_saves_as_much_memory_as_without_scores(record_property, reentrant):
    model = tiny_gpt2(layers=6)
    train, val = token_batch(6, 31, seed=1), token_batch(2, 31, seed=2)
    joint = torch.cat([train[0], val[0]])
    whole = saved_bytes(model, lambda: model(joint).logits)
    kwargs = {"use_reentrant": reentrant}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    regular = saved_bytes(model, lambda: model(joint).logits)
    engine = attached(model, val)
    engine.attach_train_batch(*train, 0, None)
    x, _ = engine.prepare_forward_input(*train)
    scored = saved_bytes(model, lambda: model(x).logits)
    record_property("saved_bytes", (whole, regular, scored))
    assert regular < 0.5 * whole and scored <= 1.02 * regular


def test_a_second_backward_is_refused():
    model, val = tiny_gpt2(), token_batch(1, 9, seed=2)
    engine = attached(model, val)
    engine.attach_train_batch(*token_batch(2, 9, seed=1), 0, None)
    x, y = engine.prepare_forward_input(*token_batch(2, 9, seed=1))
    loss = lm_loss(model(x).logits, y)
    loss.backward(retain_graph=True)
    with pytest.raises(GraddotError, match="2 backward passes"):
        loss.backward()


# Evaluation, attaching and detaching


def test_evaluation_in_the_midst_of_a_step(close):
    model = tiny_gpt2().double()
    train, val = token_batch(4, 15, seed=1), token_batch(2, 15, seed=2)
    dots, scales = sample_dots(model, train, val)
    other = token_batch(3, 20, seed=5)[0]
    want = copy.deepcopy(model)(other).logits
    engine = attached(model, val)

    def evaluate():
        model.eval()
        with torch.no_grad():
            assert torch.equal(model(other).logits, want)
            model.transformer(other)
            with pytest.raises(IndexError):
                model(other + 100)
        model.train()

    evaluate()
    engine.attach_train_batch(*train, 0, None)
    evaluate()
    x, y = engine.prepare_forward_input(*train)
    loss = lm_loss(model(x).logits, y)
    evaluate()
    loss.backward()
    evaluate()
    engine.prepare_gradients()
    evaluate()
    close(engine.aggregate_and_log(), total(dots), 1e-10, total(scales))
    same_gradients(model, gradient(model, *train), 1e-10)


def test_a_forward_that_failed_is_tried_again(close):
    model = tiny_gpt2().double()
    train, val = token_batch(4, 15, seed=1), token_batch(2, 15, seed=2)
    dots, scales = sample_dots(model, train, val)
    engine = attached(model, val)
    engine.attach_train_batch(*train, 0, None)
    x, y = engine.prepare_forward_input(*train)
    fail = model.transformer.ln_f.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(x)
    fail.remove()
    lm_loss(model(x).logits, y).backward()
    engine.prepare_gradients()
    close(engine.aggregate_and_log(), total(dots), 1e-10, total(scales))


def test_detached_and_attached_again_in_a_run(close):
    model = tiny_gpt2().double()
    train, val = token_batch(4, 15, seed=1), token_batch(2, 15, seed=2)
    dots, scales = sample_dots(model, train, val)
    want_grad = gradient(model, *train)
    engine = attached(model, val)
    run(engine, train)
    first = engine.aggregate_and_log()
    engine.attach_train_batch(*train, 1, None)
    x, y = engine.prepare_forward_input(*train)
    loss = lm_loss(model(x).logits, y)
    engine.detach()  # in the midst: no scores, but the training gradient
    model.zero_grad()
    loss.backward()
    same_gradients(model, want_grad, 1e-10)
    model.zero_grad()
    lm_loss(model(train[0]).logits, train[1]).backward()
    same_gradients(model, want_grad, 1e-10)
    engine.attach()
    model.zero_grad()
    run(engine, train)
    same_gradients(model, want_grad, 1e-10)
    close(engine.aggregate_and_log(), first, 1e-12)
    close(first, total(dots), 1e-10, total(scales))
