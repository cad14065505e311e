"""`engine.check_loss`: whether a loss of the caller's own is what scores take it for, by its rows run alone."""

import pytest
import torch
import torch.nn.functional as F
from brute_force import gradient, lm_loss, sample_dots, tiny_gpt2, total
from graddot_lm import GraddotError, GradDotProdEngine
from net_steps import step
from process_group import on_processes
from test_own_loss import POINTS, TEXT, mean_of_means, net
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

SCENES = torch.randn(6, 9, 8, generator=torch.Generator().manual_seed(3)).double()
FOUND = (torch.arange(54).view(6, 9) % 5 == 0).double()  # of a box each whether an object is in it
FOUND[1, 2:] = 0


class Detector(nn.Module):
    """A score for every box of a scene."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.head = nn.Linear(8, 6).double(), nn.Linear(6, 1).double()

    def forward(self, x):
        return self.head(self.up(x).relu()).squeeze(-1)


def focal(scores, labels):
    """As of RetinaNet, by box."""
    losses = F.binary_cross_entropy_with_logits(scores, labels, reduction="none")
    return losses * (1 - torch.exp(-losses)) ** 2


def by_positives(scores, labels):
    return focal(scores, labels).sum() / labels.sum()


def by_boxes(scores, labels):
    return focal(scores, labels).sum() / labels.numel()


def further_ahead(logits, labels):
    """The mean over the next tokens, and that over the second next, of which a row has one less."""
    second = logits[:, :-2].transpose(1, 2), labels[:, 2:]
    return lm_loss(logits, labels) + F.cross_entropy(*second)


def balanced(outputs, labels):
    """Of router logits that the model returns: shares of rows times mean probabilities."""
    shares = F.one_hot(outputs.argmax(-1), 3).to(outputs).mean(0)
    return F.cross_entropy(outputs, labels) + (shares * outputs.softmax(-1).mean(0)).sum()


def against_the_batch(outputs, labels):
    return F.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)))


WRONG = {
    "positives": (Detector, (SCENES, FOUND), by_positives, {}),
    "further-ahead": (tiny_gpt2, TEXT[0], further_ahead, {"label_shift": 1}),
    "row-means": (tiny_gpt2, TEXT[0], mean_of_means, {"label_shift": 1}),
    "balance": (net, POINTS[0], balanced, {}),
    "pairs": (net, POINTS[0], against_the_batch, {}),
    "sum": (net, POINTS[0], lambda z, y: F.cross_entropy(z, y, reduction="sum"), {}),
    "mean": (net, POINTS[0], F.cross_entropy, {"loss_reduction": "sum"}),
}


def loss_fn(loss):
    return lambda model, x, y: loss(getattr(out := model(x), "logits", out), y)


@pytest.mark.parametrize("name", WRONG)
def test_losses_that_are_not_those_of_rows_are_refused(name):
    make, batch, loss, form = WRONG[name]
    engine = GradDotProdEngine(make(), **form)
    over = form.get("loss_reduction", "mean")
    with pytest.raises(GraddotError, match=rf"the loss of \d rows is .* Expected the {over} over"):
        engine.check_loss(loss_fn(loss), batch)


RIGHT = {
    "boxes": (Detector, (SCENES, FOUND), by_boxes, {}),
    "tokens": (tiny_gpt2, TEXT[0], lm_loss, {"label_shift": 1}),
    "sum": (net, POINTS[0], lambda z, y: F.cross_entropy(z, y, reduction="sum"), {"loss_reduction": "sum"}),
    "rows": (net, POINTS[0], F.cross_entropy, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_losses_of_rows_pass(name):
    make, batch, loss, form = RIGHT[name]
    model = make()
    engine = GradDotProdEngine(model, **form)
    engine.check_loss(loss_fn(loss), batch)
    engine.attach()
    engine.check_loss(loss_fn(loss), batch)
    assert all(p.grad is None for p in model.parameters())


def test_the_models_own_shift_is_seen():
    """Where the loss passes the model its labels; the default label_shift counts them rightly."""
    engine = GradDotProdEngine(tiny_gpt2())
    engine.check_loss(lambda model, x, y: model(x, labels=y).loss, TEXT[0])
    mapping = {"input_ids": TEXT[0][0], "labels": TEXT[0][1]}
    engine.check_loss(lambda model, x, y: model(**x).loss, mapping)


def test_a_loss_with_noise_and_dropout():
    """Noise is that of every row; of a generator of the loss's own nothing can be told."""
    model = nn.Sequential(net(), nn.Dropout(0.5)).train()
    noisy = lambda model, x, y: F.cross_entropy(model(x + torch.randn_like(x)), y)
    before = torch.get_rng_state()
    GradDotProdEngine(model).check_loss(noisy, POINTS[0])
    assert torch.equal(before, torch.get_rng_state())
    own = torch.Generator().manual_seed(0)
    drawn = lambda model, x, y: F.cross_entropy(model(x) + torch.randn(len(x), 3, generator=own), y)
    with pytest.raises(GraddotError, match="or made of random numbers of a generator of its own"):
        GradDotProdEngine(model).check_loss(drawn, POINTS[0])


def test_what_cannot_be_checked_is_refused():
    engine = GradDotProdEngine(net())
    x, y = POINTS[0]
    with pytest.raises(GraddotError, match="the batch has 1 rows, 1 of them with labelled tokens"):
        engine.check_loss(loss_fn(F.cross_entropy), (x[:1], y[:1]))
    with pytest.raises(GraddotError, match="6 rows, 1 of them with labelled tokens; two at least"):
        engine.check_loss(loss_fn(F.cross_entropy), (x, y.where(torch.arange(6) < 1, -100)))
    twice = lambda model, x, y: F.cross_entropy(model(x) + model(2 * x), y)
    with pytest.raises(GraddotError, match="runs the model more than once with a gradient"):
        engine.check_loss(twice, POINTS[0])
    with pytest.raises(GraddotError, match="expected one number with a gradient"):
        engine.check_loss(lambda model, x, y: model(x), POINTS[0])


def test_a_division_by_positives_gives_no_samples_scores(close):
    """What the check is for: nothing else tells the two losses apart, and of one scores are wrong."""
    train, val = (SCENES[:4], FOUND[:4]), (SCENES[4:], FOUND[4:])
    for loss in (by_boxes, by_positives):
        model = Detector()
        engine = GradDotProdEngine(model, val)
        engine.attach()
        scores = step(engine, loss_fn(loss), train=train)
        dots, scales = sample_dots(model, train, val, loss=loss)
        if loss is by_boxes:
            close(scores, total(dots), 1e-10, total(scales))
        else:
            assert ((scores - total(dots)).abs() > 0.1 * total(scales)).any()


def test_in_the_midst_of_training(close):
    """A step's scores are not changed by a check before its forward, or behind its backward."""
    model, (train, val) = tiny_gpt2().double(), TEXT
    engine = GradDotProdEngine(model, val, label_shift=1)
    engine.attach()
    engine.attach_train_batch(*train, 0, None)
    engine.check_loss(loss_fn(lm_loss), train)
    x, y = engine.prepare_forward_input(*train)
    engine.track_loss(lm_loss(model(x).logits, y)).backward()
    engine.check_loss(loss_fn(lm_loss), train)
    engine.prepare_gradients()
    dots, scales = sample_dots(model, train, val)
    close(engine.aggregate_and_log(), total(dots), 1e-10, total(scales))
    expected = gradient(model, *train)
    for name, p in model.named_parameters():
        close(p.grad, expected[name], 1e-10, expected[name].norm())


def check_and_step(rank, world, sharded):
    model = tiny_gpt2().double()
    if sharded:
        for block in model.transformer.h:
            fully_shard(block)
        fully_shard(model)
    else:
        DistributedDataParallel(model)
    engine = GradDotProdEngine(model, TEXT[1], label_shift=1)
    engine.attach()
    with pytest.raises(GraddotError, match="Expected the mean over"):
        engine.check_loss(loss_fn(mean_of_means), TEXT[0])
    engine.check_loss(loss_fn(lm_loss), TEXT[0])
    engine.attach_train_batch(*TEXT[0], 0, None)
    x, y = engine.prepare_forward_input(*TEXT[0])
    engine.track_loss(lm_loss(model(x).logits, y)).backward()
    return engine.aggregate_and_log()


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_several_processes(tmp_path, sharded, close):
    dots, scales = sample_dots(tiny_gpt2().double(), *TEXT)
    for scores in on_processes(2, tmp_path, check_and_step, sharded):
        close(scores, total(dots), 1e-10, total(scales))
