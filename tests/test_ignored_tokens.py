"""Labels that the loss ignores, samples and tokens whose gradient is zero without it, and tokens that
a model picks by their values."""

import pytest
import torch
import torch.nn.functional as F
from brute_force import sample_dots, tiny_gpt2, token_batch, total
from graddot_lm import GraddotError, GradDotProdEngine
from net_steps import TRAIN, VAL, Net, X, attached, step
from torch import nn


class Pixels(nn.Module):
    """Classes in the second dimension of what it returns, as segmentation has them."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(8, 3, 1).double()

    def forward(self, x):
        return self.conv(x.transpose(1, 2))


def test_an_ignored_label_is_noticed_where_classes_come_second():
    labels = torch.arange(30).view(6, 5) % 3
    labels[1, 2:] = 255
    engine = GradDotProdEngine(Pixels(), (X[4:], labels[4:]))
    engine.attach()
    engine.attach_train_batch(X[:4], labels[:4], 0, None)
    F.cross_entropy(engine.model(X), labels, ignore_index=255).backward()
    with pytest.raises(GraddotError, match="row 1 of the batch has 5 labelled tokens.*used 2"):
        engine.prepare_gradients()


@pytest.mark.parametrize("tokens", [False, True])
def test_an_ignored_label_that_comes_late_is_noticed(tokens):
    """The loss says which it ignores before it meets one; in steps that are not checked it is looked for."""
    model = Pixels() if tokens else Net()
    labels = torch.arange(30).view(6, 5) % 2 if tokens else torch.arange(6) % 2
    late = labels.clone()
    late[1] = 2
    val = X[4:], labels[4:]
    loss_of = lambda model, x, y: F.cross_entropy(model(x), y, ignore_index=2)
    engine = attached(model, val=val)
    for number in range(2):
        step(engine, loss_of, number=number, train=(X[:4], labels[:4]))
    used = "5 labelled.*used 0" if tokens else "1 labelled.*used 0"
    with pytest.raises(GraddotError, match=f"row 1 of the batch has {used}"):
        step(engine, loss_of, number=2, train=(X[:4], late[:4]))


def test_a_label_that_another_part_of_the_loss_ignores(close):
    """Labels of 2 are looked at when they come, and counted rightly."""
    model, labels = Net(), torch.arange(6) % 2
    late = labels.clone()
    late[1] = 2

    def both(out, y):
        return F.cross_entropy(out, y) + F.cross_entropy(out, (y + 1) % 2, ignore_index=2)

    engine = attached(model, val=(X[4:], labels[4:]))
    for number, y in enumerate((labels, late, late)):
        train = X[:4], y[:4]
        dots, scales = sample_dots(model, train, (X[4:], labels[4:]), loss=both)
        loss_of = lambda model, x, y: both(model(x), y)
        scores = step(engine, loss_of, number=number, train=train)
        close(scores, total(dots), 1e-10, total(scales))


def test_samples_beyond_the_margin_of_a_hinge_loss(close):
    """They get a gradient of 0, which is no sign of labels that the loss ignores."""
    model = Net()
    engine = attached(model)
    loss = lambda out, y: F.multi_margin_loss(out, y, margin=0.2)
    loss_of = lambda model, x, y: loss(model(x), y)
    with torch.no_grad():
        model.head.weight.mul_(0.05)
        model.head.bias.zero_()
    for number in range(10):
        step(engine, loss_of, number=number)
    with torch.no_grad():
        model.head.weight.mul_(200)
    dots, scales = sample_dots(model, TRAIN, VAL, loss=loss)
    scores = step(engine, loss_of, number=10)
    assert 0 < (scores == 0).sum() < 4
    close(scores, total(dots), 1e-10, total(scales))


def test_a_first_step_without_a_labelled_token_is_not_the_checked_one():
    """Nothing is seen of its loss, which is 0: the next is looked at in its place."""
    engine = GradDotProdEngine(Net(), loss_reduction="sum")
    engine.attach()
    engine.set_directions({n: torch.ones_like(p) for n, p in engine.model.named_parameters()})

    def loss_of(model, x, y):
        return F.cross_entropy(model(x), y.where(y != 1, -100), reduction="sum")

    unlabelled = torch.full_like(TRAIN[1], -100)
    for number in range(2):
        assert not step(engine, loss_of, number=number, train=(TRAIN[0], unlabelled)).any()
    with pytest.raises(GraddotError, match="row 1 of the batch has 1 labelled .*the loss used 0"):
        step(engine, loss_of, number=2)


@pytest.mark.parametrize("ignored", [False, True])
def test_tokens_whose_gradient_rounds_to_zero(close, ignored):
    """They are predicted with certainty; what the loss ignores beside them is still found."""
    model, val = tiny_gpt2().double(), token_batch(1, 9, seed=2)
    x, y = token_batch(3, 9, seed=1)
    engine = GradDotProdEngine(model, val, label_shift=1)
    engine.attach()
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(1e4)
        y[:, 1:4] = model(x).logits[:, :3].argmax(-1)

    def loss(logits, y):
        labels = y[:, 1:]
        labels = torch.where(labels == y[0, -1], -100, labels) if ignored else labels
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())

    def run_step():
        engine.attach_train_batch(x, y, 0, None)
        joint, labels = engine.prepare_forward_input(x, y)
        logits = model(joint).logits
        logits.retain_grad()
        engine.track_loss(loss(logits, labels)).backward()
        engine.prepare_gradients()
        return engine.aggregate_and_log(), (logits.grad == 0).all(-1)

    if ignored:
        with pytest.raises(GraddotError, match="but the loss used"):
            run_step()
        return
    dots, scales = sample_dots(model, (x, y), val, loss=loss)
    scores, idle = run_step()
    close(scores, total(dots), 1e-9, total(scales))
    assert idle[:3, :3].any()


class Picked(nn.Module):
    """Predicts the tokens that are masked, 0, and looks at no other."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 8), nn.Linear(8, 9)
        self.double()

    def forward(self, ids):
        hidden = self.embed(ids).cumsum(1)
        return self.head(hidden[ids == 0])


@pytest.mark.parametrize(
    ("masked", "reason"),
    [
        ((2, 2, 2, 2), "layer head gets tokens that are picked by their values"),
        ((1, 1, 1, 1), "layer head gets tokens that are picked by their values"),
        ((2, 0, 1, 1), "layer head gets an input .* does not hold them one after the other"),
    ],
    ids=str,
)
def test_tokens_picked_by_their_values_are_refused(masked, reason):
    """Also where there is one a row, or as many as if there were."""
    model = Picked()
    ids = torch.randint(1, 9, (4, 6))
    for row, number in zip(ids, masked, strict=True):
        row[1 : 1 + number] = 0
    engine = GradDotProdEngine(model, (ids[3:], ids[3:]))
    engine.attach()
    engine.attach_train_batch(ids[:3], ids[:3], 0, None)
    with pytest.raises(GraddotError, match=reason):
        model(ids)
