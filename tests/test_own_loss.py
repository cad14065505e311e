"""Losses of the caller's own: those that are no mean over the batch's labelled tokens are refused."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from brute_force import gradient, lm_loss, sample_dots, tiny_gpt2, token_batch, total
from engine_steps import close, run_step
from graddot_lm import GraddotError, GradDotProdEngine
from torch import nn

TEXT = token_batch(4, 9, seed=1, ragged=True), token_batch(2, 9, seed=2, ragged=True)
CLASS_WEIGHTS = torch.tensor([1.0, 0.2, 3.0])


def points(rows, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 5, generator=g), torch.arange(rows) % 3


POINTS = points(6, seed=1), points(3, seed=2)


def net(width=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, width))


def token_losses(logits, labels, **form):
    losses = F.cross_entropy(
        logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none", **form
    )
    return losses, labels[:, 1:] != -100


def mean_of_means(logits, labels, **form):
    losses, used = token_losses(logits, labels, **form)
    return (losses.sum(1) / used.sum(1)).mean()


def smoothed_mean_of_means(logits, labels):
    return mean_of_means(logits, labels, label_smoothing=0.1)


def smoothed_lm_loss(logits, labels):
    losses, used = token_losses(logits, labels, label_smoothing=0.1)
    return losses.sum() / used.sum()


def two_means(logits, labels):
    n = len(POINTS[0][0])
    return F.cross_entropy(logits[:n], labels[:n]) + F.cross_entropy(logits[n:], labels[n:])


def with_token_weights(logits, labels):
    losses, used = token_losses(logits, labels)
    weights = used * torch.linspace(1, 2, losses.shape[1], dtype=logits.dtype)
    return (losses * weights).sum() / weights.sum()


WEIGHTED = {
    "row-means": (tiny_gpt2, TEXT, mean_of_means, 1, "0.02381 to 0.04167 .*add up to one, as"),
    "smoothed": (tiny_gpt2, TEXT, smoothed_mean_of_means, 1, "0.02381 to 0.04167 .*to one, as"),
    "tokens": (tiny_gpt2, TEXT, with_token_weights, 1, "add up to one, as in a mean of rows' own"),
    "two-means": (net, POINTS, two_means, 0, "0.1667 to 0.3333.*each, as in a sum of two means"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("factor", [1.0, 1024.0])
@pytest.mark.parametrize("name", WEIGHTED)
def test_weights_that_depend_on_the_batch_are_refused(name, factor, dtype):
    make, (train, val), loss, shift, text = WEIGHTED[name]
    model = make().to(dtype)
    if train[0].is_floating_point():
        train, val = ((x.to(dtype), y) for x, y in (train, val))
    if dtype == torch.bfloat16:
        text = "add up to one"
    with pytest.raises(GraddotError, match=text):
        run_step(model, train, val, loss=loss, factor=factor, label_shift=shift)


def a_sum(logits, labels):
    return token_losses(logits, labels)[0].sum()


def over_rows(logits, labels):
    return a_sum(logits, labels) / len(labels)


def over_all_tokens(logits, labels):
    return token_losses(logits, labels)[0].mean()


def smoothed_over_all_tokens(logits, labels):
    return token_losses(logits, labels, label_smoothing=0.1)[0].mean()


def by_classes(logits, labels, weight=CLASS_WEIGHTS, **form):
    return F.cross_entropy(logits, labels, weight=weight.to(logits), **form)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("part", [0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_mean_with_weights_of_classes_is_refused(dtype, part, smoothing):
    loss = lambda *args: part * by_classes(*args, label_smoothing=smoothing)
    train, val = ((x.to(dtype), y) for x, y in POINTS)
    with pytest.raises(
        GraddotError, match="weights of classes, .* none of its 9 samples has a loss"
    ):
        run_step(net().to(dtype), train, val, loss=loss, label_shift=0)


def over_samples(logits, labels):
    return by_classes(logits, labels, reduction="sum") / len(labels)


def each_alone(logits, labels):
    rows = zip(logits.split(1), labels.split(1), strict=True)
    return torch.stack([by_classes(*row) for row in rows]).mean()


def without_a_class(logits, labels):
    """As padding is left out."""
    return by_classes(logits, labels, torch.tensor([2.0, 0.0, 2.0]))


@pytest.mark.parametrize(
    ("loss", "options"),
    [(over_samples, {}), (each_alone, {}), (without_a_class, {"ignore_index": 1})],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_weights_of_classes_are_exact(loss, options):
    """Where no sample's loss is divided by those of others."""
    train, val = ((x.double(), y) for x, y in POINTS)
    model = net().double()
    scores, _ = run_step(model, train, val, loss=loss, label_shift=0, **options)
    rows = [i for i, y in enumerate(train[1]) if y != options.get("ignore_index")]
    few = tuple(x[rows] for x in train)
    close(scores[rows], total(sample_dots(net().double(), few, val, loss)[0]), 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("part", [0.1, 0.5, 3.0])
def test_a_factor_hides_no_mean_of_means(part, dtype):
    half = lambda *args: part * mean_of_means(*args)
    with pytest.raises(GraddotError, match="add up to the same in every row"):
        run_step(tiny_gpt2().to(dtype), *TEXT, loss=half)


def test_weights_by_length_are_exact():
    """Where the sum is divided by the number of labelled tokens, as of other weights of samples."""

    def weighted(logits, labels):
        losses, used = token_losses(logits, labels)
        return (losses.sum(1) / used.sum(1)).sum() / used.sum()

    scores, _ = run_step(tiny_gpt2().double(), *TEXT, loss=weighted)
    want = total(sample_dots(tiny_gpt2().double(), *TEXT, weighted)[0])
    close(scores, want, 1e-10)


OTHERWISE_DIVIDED = {
    "sum": (a_sum, "weighs 1 in .* as in a sum. .* loss_reduction='sum'"),
    "rows": (over_rows, "weighs 0.1667 in .* divided by the number of rows or of all tokens"),
    "tokens": (over_all_tokens, "weighs 0.02083 in .* divided by the number of rows or of all"),
    "smoothed": (smoothed_over_all_tokens, "weighs 0.02083 in .* divided by the number of rows"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("factor", [1.0, 1024.0])
@pytest.mark.parametrize("name", OTHERWISE_DIVIDED)
def test_a_sum_that_is_divided_by_another_number_is_refused(name, factor, dtype):
    """Training gradients would be off by a factor, and each score by another."""
    loss, text = OTHERWISE_DIVIDED[name]
    with pytest.raises(GraddotError, match=text):
        run_step(tiny_gpt2().to(dtype), *TEXT, loss=loss, factor=factor)


def test_a_factor_of_the_whole_loss_belongs_to_it():
    (x, y), (xv, yv) = TEXT
    half = lambda *args: lm_loss(*args) / 2
    scores, _ = run_step(tiny_gpt2().double(), (x, y), (xv, yv), loss=half)
    close(scores, total(sample_dots(tiny_gpt2().double(), (x, y), (xv, yv), half)[0]), 1e-10)


class Losses(nn.Module):
    """Returns the losses of tokens, or the means of rows."""

    def __init__(self, of_rows):
        super().__init__()
        self.model, self.of_rows = tiny_gpt2(), of_rows

    def forward(self, ids, labels):
        losses, used = token_losses(self.model(ids).logits, labels)
        return losses.sum(1) / used.sum(1) if self.of_rows else losses


def step_of_losses(of_rows, reduce, ragged=True):
    (x, y), val = (token_batch(n, 9, seed=n, ragged=ragged) for n in (4, 2))
    model = Losses(of_rows)
    engine = GradDotProdEngine(model, val, label_shift=1)
    engine.attach()
    engine.attach_train_batch(x, y, 0, None)
    x, y = engine.prepare_forward_input(x, y)
    engine.track_loss(reduce(model(x, y), (y[:, 1:] != -100).sum(1))).backward()
    engine.prepare_gradients()
    return engine.aggregate_and_log()


@pytest.mark.parametrize("of_rows", [False, True], ids=["tokens", "rows"])
def test_losses_of_tokens_or_rows_are_added_up_as_expected(of_rows):
    for reduce, text in [
        (lambda losses, counts: losses.mean(), "divided by the number of rows or of all tokens"),
        (lambda losses, counts: losses.sum(), "as in a sum"),
    ]:
        with pytest.raises(GraddotError, match=text):
            step_of_losses(of_rows, reduce)
    by_token = lambda x, n: (x * n if of_rows else x).sum() / n.sum()
    got = step_of_losses(of_rows, by_token)
    batches = (token_batch(n, 9, seed=n, ragged=True) for n in (4, 2))
    want, scales = (total(x) for x in sample_dots(tiny_gpt2(), *batches))
    assert ((got - want).abs() <= 1e-5 * scales).all()
    step_of_losses(of_rows, lambda losses, counts: losses.mean(), ragged=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rows", [2, 4])
def test_label_smoothing_is_no_weight_of_tokens(rows, dtype):
    train = token_batch(rows, 9, seed=3, ragged=True)
    run_step(tiny_gpt2().to(dtype), train, TEXT[1], loss=smoothed_lm_loss)


def test_of_many_classes_a_few_tokens_are_looked_at(monkeypatch):
    monkeypatch.setattr("graddot_lm.checks.own_loss.AT_MOST", 2 * 6 * 61)
    with pytest.raises(GraddotError, match="add up to one, as in a mean of rows' own means"):
        run_step(tiny_gpt2(), *TEXT, loss=mean_of_means)
    run_step(tiny_gpt2(), *TEXT, loss=lm_loss)


def test_weights_of_samples_are_exact():
    """That have nothing to do with the batch: the sample's loss is then that many times as large."""
    (x, y), (xv, yv) = TEXT
    rows = torch.tensor([0.5, 2.0, 1.3, 0.1, 1.0, 0.7], dtype=torch.float64)

    def weighted(logits, labels, weights=rows):
        losses, used = token_losses(logits, labels)
        return (losses * weights.to(logits)[:, None]).sum() / used.sum()

    model = tiny_gpt2().double()
    scores, _ = run_step(model, (x, y), (xv, yv), loss=weighted)
    val_grad = gradient(model, xv, yv, loss=lambda *args: weighted(*args, rows[4:]))
    for i in range(4):
        own = gradient(model, x[[i]], y[[i]], loss=lm_loss)
        want = sum((val_grad[n] * own[n]).sum() for n in own) * rows[i]
        close(scores[i], want, 1e-10)


def test_the_mean_of_rows_own_means():
    """Exact with labels of one number a row, as the message says."""
    (x, y), (xv, yv) = TEXT
    model = tiny_gpt2().double()
    exact = copy.deepcopy(model)
    batch = lambda ids, labels: {
        "input_ids": ids, "token_labels": labels, "labels": torch.zeros(len(ids), dtype=torch.long)
    }  # fmt: skip
    engine = GradDotProdEngine(model, batch(xv, yv), label_shift=0)
    engine.attach()
    engine.attach_train_batch(batch(x, y), None, 0, None)
    joint, _ = engine.prepare_forward_input(batch(x, y), None)
    logits = model(joint["input_ids"]).logits
    engine.track_loss(mean_of_means(logits, joint["token_labels"])).backward()
    engine.prepare_gradients()
    scores = engine.aggregate_and_log()
    val_grad = gradient(exact, xv, yv, loss=mean_of_means)
    for i in range(4):
        own = gradient(exact, x[[i]], y[[i]], loss=lm_loss)
        close(scores[i], sum((val_grad[n] * own[n]).sum() for n in own), 1e-10)
    for name, want in gradient(exact, x, y, loss=mean_of_means).items():
        torch.testing.assert_close(model.get_parameter(name).grad, want, rtol=1e-9, atol=1e-12)


def contrastive(out, labels):
    return F.cross_entropy(F.normalize(out) @ F.normalize(out).T / 0.1, labels.flip(0))


def ranked(out, labels):
    return F.softplus(out[0::2, 0][:4] - out[1::2, 0][:4]).sum() / len(out)


def standardised(out, labels):
    return ((out - out.mean(0)) / out.std(0)).tanh().square().mean()


def root(out, labels):
    return F.mse_loss(out, torch.zeros_like(out)).sqrt()


def hardest(out, labels):
    far = torch.cdist(out, out) + 1e9 * torch.eye(len(out)).to(out)
    return F.relu(1 + out.square().sum(1) - far.amin(1)).mean()


def hardest_of_halves(out, labels):
    a, b = out[: len(out) // 2 * 2].chunk(2)
    return F.relu(9 - torch.cdist(a, b).amin(1)).sum() / len(out)


def spread(out, labels):
    return F.relu(1 - F.pdist(out)).mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("given", [False, True], ids=["riding", "given"])
@pytest.mark.parametrize(
    "loss", [contrastive, ranked, standardised, root, hardest, hardest_of_halves, spread]
)
def test_a_loss_that_compares_samples_is_refused(loss, given, dtype):
    model, ((x, y), (xv, yv)) = net(width=4).to(dtype), POINTS
    engine = GradDotProdEngine(model, None if given else (xv.to(dtype), yv), label_shift=0)
    if given:
        engine.set_directions({n: torch.ones_like(p) for n, p in model.named_parameters()})
    engine.attach()
    engine.attach_train_batch(x.to(dtype), y, 0, None)
    out = model(engine.prepare_forward_input(x.to(dtype), y)[0])
    with pytest.raises(GraddotError, match="compares samples: .* (6|9) rows"):
        engine.track_loss(loss(out, torch.arange(len(out))))


class WithTable(nn.Module):
    """Returns embeddings, and a table of as many entries as the batch has rows."""

    def __init__(self, rows):
        super().__init__()
        self.embed = net(4)
        self.register_buffer("table", torch.randn(rows, 4))

    def forward(self, x):
        return self.embed(x), self.table.clone().requires_grad_()


def test_a_loss_by_a_table_of_as_many_entries_as_rows():
    (x, y), (xv, yv) = POINTS
    model = WithTable(len(x) + len(xv))
    engine = GradDotProdEngine(model, (xv, yv), label_shift=0)
    engine.attach()
    engine.attach_train_batch(x, y, 0, None)
    out, table = model(engine.prepare_forward_input(x, y)[0])
    engine.track_loss(F.cross_entropy(out @ table.T, torch.arange(9))).backward()
    engine.prepare_gradients()


class NotTwice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.calls = 0
        return x.square().mean()

    @staticmethod
    def backward(ctx, grad):
        ctx.calls += 1
        assert ctx.calls == 1
        return grad * torch.ones(9, 3) / 27


def test_a_loss_with_a_backward_of_its_own_runs_it_once():
    run_step(net(), *POINTS, loss=lambda out, y: NotTwice.apply(out), label_shift=0)


def balance(out):
    p = F.softmax(out, -1)
    return (F.one_hot(p.argmax(-1), p.shape[1]).to(p).mean(0) * p.mean(0)).sum()


def penalty(out):
    return out.square().mean()


class Keeps(nn.Module):
    """Leaves a number of its output for the loop, as hand-written mixtures of experts do."""

    def __init__(self, number, keep):
        super().__init__()
        self.embed, self.number, self.keep, self.kept = net(), number, keep, []

    def forward(self, x):
        out = self.embed(x)
        self.keep(self, self.number(out))
        return out


def in_attribute(model, number):
    model.kept = number


def in_list(model, number):
    model.kept.append(number)


ELSEWHERE = []


@pytest.fixture(autouse=True)
def nothing_elsewhere():
    """Whichever test of this process kept something there before."""
    ELSEWHERE.clear()


def elsewhere(model, number):
    ELSEWHERE.append(number)


def kept_by(model):
    kept = model.kept if isinstance(model.kept, torch.Tensor) else [*model.kept, *ELSEWHERE][-1]
    return lambda out, y: F.cross_entropy(out, y) + 0.5 * kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep", [in_attribute, in_list])
def test_a_kept_number_over_the_batch_is_refused(keep, dtype):
    model = Keeps(balance, keep).to(dtype)
    train, val = (tuple(x.to(dtype) if x.is_floating_point() else x for x in b) for b in POINTS)
    with pytest.raises(
        GraddotError, match=r"^kept(\[0\])?, of which the loss is made, is 0.* mean"
    ):
        run_step(model, train, val, loss=lambda *of: kept_by(model)(*of), label_shift=0)
    run_step(Keeps(balance, keep).to(dtype), train, val, loss=F.cross_entropy, label_shift=0)


def test_a_returned_number_over_the_batch_is_refused_where_it_is_used():
    class Returns(Keeps):
        def forward(self, x):
            out = self.embed(x)
            return out, self.number(out)

    step = functools.partial(run_step, train=POINTS[0], val=POINTS[1], label_shift=0)
    with pytest.raises(GraddotError, match="the model's loss is 0.* Expected the mean"):
        step(
            Returns(balance, in_attribute), loss=lambda out, y: F.cross_entropy(out[0], y) + out[1]
        )
    step(Returns(balance, in_attribute), loss=lambda out, y: F.cross_entropy(out[0], y))


@pytest.mark.parametrize("keep", [in_attribute, in_list])
def test_a_kept_mean_of_rows_is_exact(keep):
    model, with_penalty = (
        Keeps(penalty, keep),
        lambda out, y: F.cross_entropy(out, y) + 0.5 * penalty(out),
    )
    want, _ = sample_dots(model.embed, *POINTS, loss=with_penalty)
    scores, _ = run_step(model, *POINTS, loss=lambda *of: kept_by(model)(*of), label_shift=0)
    close(scores, total(want), 1e-5)


def test_a_number_kept_outside_of_the_model_is_refused():
    model, other = Keeps(penalty, elsewhere), Keeps(penalty, elsewhere)
    with pytest.raises(GraddotError, match="neither returned nor kept in a module's attribute"):
        run_step(model, *POINTS, loss=lambda *of: kept_by(model)(*of), label_shift=0)
    ELSEWHERE.clear()
    with pytest.raises(GraddotError, match="computed when the engine ran it on parts of the batch"):
        run_step(
            other, *POINTS, label_shift=0,
            loss=lambda out, y: out.square().mean() + next(x for x in ELSEWHERE if x.requires_grad),
        )  # fmt: skip


def test_what_a_hook_sees_is_that_of_the_step():
    """As in the distillation of features: the checks' runs come before."""
    model, seen = net(), {}

    def features(out, y):
        return F.cross_entropy(out, y) + (seen["hidden"] - 0.3).square().mean()

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = copy.deepcopy(model)

        def forward(self, x):
            hidden = self.net[1](self.net[0](x))
            return torch.cat([self.net[2](hidden), hidden], 1)

    def of_both(out, y):
        return F.cross_entropy(out[:, :3], y) + (out[:, 3:] - 0.3).square().mean()

    want, _ = sample_dots(Both(), *POINTS, loss=of_both)
    model[1].register_forward_hook(lambda module, args, out: seen.update(hidden=out))
    scores, _ = run_step(model, *POINTS, loss=features, label_shift=0)
    close(scores, total(want), 1e-5)
