"""Given directions: validation sets of any size, several targets, AdamW's next step, dots by token.

All against the float64 brute force, one backward a sample.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from brute_force import gradient, lm_loss, sample_dots, tiny_gpt2, token_batch, total
from engine_steps import SharedEverything
from graddot_lm import GraddotError, GradDotProdEngine, adamw_direction, fuse_head
from loop_steps import (
    attached,
    loss_of_logits,
    padded,
    run,
    same_gradients,
    tiny_bert,
)
from torch import nn


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


def test_how_a_validation_loss_shifts_labels_is_seen(close):
    """The default label_shift is that of the model where loss_fn passes it the labels; where loss_fn shifts
    them itself, batches of two lengths would be weighted by other numbers of tokens."""
    model = tiny_gpt2().double()
    vals = [token_batch(2, 4, seed=2), token_batch(1, 20, seed=3)]
    engine = GradDotProdEngine(model)
    parts = [gradient(model, *val) for val in vals]
    compiled = torch.compile(model, backend="eager")
    for call in (model, compiled, compiled):
        got = engine.compute_directions(vals, lambda _, x, y: call(x, labels=y).loss)  # noqa: B023
        for name, direction in got.items():
            want = (6 * parts[0][name] + 19 * parts[1][name]) / 25
            close(direction, want, 1e-6, want.norm())
    with pytest.raises(
        GraddotError, match="row 0 of the batch has 4 .* the loss used 3. Pass label_shift=1"
    ):
        engine.compute_directions(vals, loss_of_logits)
    shifted = lambda model, x, y: F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten())
    GradDotProdEngine(model, label_shift=0).compute_directions(vals, shifted)
    with pytest.raises(
        GraddotError,
        match="row 0 of the batch has 3 .* the loss used 4. Pass label_shift=1 .*, and 0 if",
    ):
        GradDotProdEngine(model, label_shift=1).compute_directions(vals, shifted)
    vals[0][1][:, 0] = -100  # by which it cannot be told: the second batch has to
    with pytest.raises(GraddotError, match="row 0 of the batch has 20 .* the loss used 19"):
        engine.compute_directions(vals, loss_of_logits)
    of_one = GradDotProdEngine(model, label_shift=1).compute_directions(vals[:1], shifted)
    want = gradient(
        model, *vals[0], loss=lambda x, y: F.cross_entropy(x.flatten(0, 1), y.flatten())
    )
    for name, direction in of_one.items():  # of one batch, whose weight does not matter
        close(direction, want[name], 1e-6, want[name].norm())


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


class OwnHead(nn.Module):
    """Uses the head's weight without calling the head, in a function that no rule knows."""

    class Times(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return x @ weight.T

        @staticmethod
        def backward(ctx, grad):
            x, weight = ctx.saved_tensors
            return grad @ weight, grad.flatten(0, -2).T @ x.flatten(0, -2)

    def __init__(self):
        super().__init__()
        self.model = tiny_gpt2(tied=False)

    def forward(self, ids):
        hidden = self.model.transformer(ids).last_hidden_state
        return self.Times.apply(hidden, self.model.lm_head.weight)


def test_excluded_weights_may_be_used_anywhere(close):
    """With given directions, for which their gradient is all that matters, and nothing is followed."""
    model = OwnHead().double()
    train, val = token_batch(3, 15, seed=1), token_batch(1, 15, seed=2)
    name = "model.lm_head.weight"
    dots, _ = sample_dots(model, train, val)
    engine = attached(model, exclude=[name])
    loss = lambda model, x, y: lm_loss(model(x), y)
    engine.set_directions(engine.compute_directions([val], loss))
    run(engine, train)
    assert not engine._forward._layers.followed()
    close(engine.aggregate_and_log(), total({n: d for n, d in dots.items() if n != name}), 1e-10)
    same_gradients(model, gradient(model, *train), 1e-10)


class RowAfterRow(nn.Module):
    """Puts its parameter beside each row's tokens by themselves, as LLaVA-NeXT does at the ends of lines."""

    def __init__(self):
        super().__init__()
        self.model = tiny_gpt2(tied=False)
        self.end = nn.Parameter(torch.rand(1, self.model.config.n_embd))

    def forward(self, ids):
        hidden = self.model.transformer(ids).last_hidden_state
        return self.model.lm_head(torch.stack([torch.cat([h[1:], self.end]) for h in hidden]))


def test_an_excluded_parameter_of_a_layer_that_cannot_be_followed(close, monkeypatch):
    monkeypatch.setattr("graddot_lm.rules.general.LARGEST", 36)  # too large to be mapped by row
    model = RowAfterRow().double()
    train, val = token_batch(3, 15, seed=1), token_batch(1, 15, seed=2)
    dots, _ = sample_dots(model, train, val)
    loss = lambda model, x, y: lm_loss(model(x), y)
    engine = attached(model)
    engine.set_directions(engine.compute_directions([val], loss))
    with pytest.raises(GraddotError, match=r"or freeze end, or with given directions exclude it"):
        run(engine, train)
    engine.detach()
    model.zero_grad()
    engine = attached(model, exclude=["end"])
    engine.set_directions(engine.compute_directions([val], loss))
    run(engine, train)
    close(engine.aggregate_and_log(), total({n: d for n, d in dots.items() if n != "end"}), 1e-10)
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
    if loss_scale == 1:
        assert error > 0.1  # what the scale is for
    else:
        record_property("relative_error", error)
        assert error <= 1e-2


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


def test_adamw_direction_of_a_parameter_without_a_gradient_so_far():
    """Left out around zero; around its first gradient, by finite differences of AdamW's own step."""
    torch.manual_seed(0)
    parameters = {n: nn.Parameter(torch.randn(4, dtype=torch.float64)) for n in ("used", "other")}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3, eps=1e-2)
    parameters["used"].grad = torch.randn(4, dtype=torch.float64)
    optimizer.step()
    ones = {n: torch.ones_like(p) for n, p in parameters.items()}
    got = adamw_direction(optimizer, parameters, ones)
    assert got["used"].all() and not got["other"].any()
    gradients = {n: torch.randn(4, dtype=torch.float64) for n in parameters}
    got = adamw_direction(optimizer, parameters, ones, gradients)

    def stepped(h):
        own = {n: nn.Parameter(p.detach().clone()) for n, p in parameters.items()}
        twin = torch.optim.AdamW(own.values(), lr=1e-3, eps=1e-2)
        twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for n, p in own.items():
            p.grad = gradients[n] + h
        twin.step()
        return own

    below, above = stepped(-1e-5), stepped(1e-5)
    for n, slope in got.items():
        torch.testing.assert_close(slope, (below[n] - above[n]) / 2e-8, rtol=1e-4, atol=1e-6)


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


def test_dots_by_token_of_a_fused_head(close):
    """As those of the model's own head."""
    model = tiny_gpt2().double()
    ids, labels = token_batch(3, 9, seed=1, ragged=True)
    direction, found = gradient(model, *token_batch(2, 15, seed=2)), []
    for fuse in (lambda model: model, fuse_head):
        engine = attached(fuse(model), per_token=True)
        engine.set_directions(direction)
        engine.attach_train_batch(ids, labels, 0, None)
        (3 * model(ids, labels=labels).loss).backward()
        engine.prepare_gradients()
        found.append(engine.token_dots())
        engine.detach()
    close(found[1], found[0], 1e-6, found[0].norm(dim=1, keepdim=True).expand(3, 9))


def test_documents_packed_into_rows(close):
    """What a document's tokens have between them is its share of the row's mean times the score of
    its own mean loss, when attention stays inside of documents."""
    model = tiny_gpt2().double()
    lengths, T = [[4, 7, 5], [9, 3, 4]], 16
    ids, _ = token_batch(2, T, seed=1)
    labels, positions = ids.clone(), torch.empty(2, T, dtype=torch.long)
    apart = torch.full((2, 1, T, T), True)
    documents = []
    for row, parts in enumerate(lengths):
        for end, length in zip(torch.tensor(parts).cumsum(0).tolist(), parts, strict=True):
            own = slice(end - length, end)
            positions[row, own], labels[row, end - length] = torch.arange(length), -100
            apart[row, 0, own, own] = torch.ones(length, length, dtype=torch.bool).triu(1)
            documents.append((row, own, length - 1))
    mask = torch.zeros(2, 1, T, T, dtype=torch.float64).masked_fill_(apart, -1e300)
    val = token_batch(3, 11, seed=2)
    direction = gradient(model, *val)
    engine = attached(model, per_token=True)
    engine.set_directions(direction)
    batch = {"input_ids": ids, "position_ids": positions, "attention_mask": mask}
    engine.attach_train_batch(batch, labels, 0, None)
    engine.track_loss(lm_loss(model(**batch).logits, labels)).backward()
    engine.prepare_gradients()
    dots = engine.token_dots()
    got = torch.stack([dots[row, own].sum() for row, own, _ in documents])
    alone = [
        gradient(model, ids[row, own][None], labels[row, own][None]) for row, own, _ in documents
    ]
    scores = torch.stack([sum((direction[n] * g[n]).sum() for n in direction) for g in alone])
    shares = torch.tensor([count / (T - 3) for _, _, count in documents], dtype=torch.float64)
    close(got, scores * shares, 1e-10)


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
