"""What a loss is multiplied by before its backward: seen in every form of it, or refused."""

from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from brute_force import sample_dots, total
from checked_backend import checked
from graddot_lm import GraddotError
from net_steps import TRAIN, VAL, Net, attached, plain_loss, step

Out = namedtuple("Out", "logits loss")
FORMS = {
    "mapping": lambda logits, loss: {"loss": loss, "logits": logits},
    "tuple": lambda logits, loss: (logits, loss),
    "list": lambda logits, loss: [loss, logits],
    "namedtuple": Out,
    "namespace": lambda logits, loss: SimpleNamespace(loss=loss, logits=logits),
    "other-key": lambda logits, loss: {"total_loss": loss},
    "number": lambda logits, loss: loss,
}


class WithLoss(Net):
    def __init__(self, form):
        super().__init__()
        self.form = form

    def forward(self, x, y):
        logits = super().forward(x)
        return self.form(logits, F.cross_entropy(logits, y))


def returned(name, x):
    """The loss in a model's output."""
    kinds = {"tuple": lambda o: o[1], "list": lambda o: o[0], "number": lambda o: o}
    attribute = lambda o: o.loss
    key = lambda o: next(o[k] for k in ("loss", "total_loss") if k in o)
    return kinds.get(name, attribute if "name" in name else key)(x)


@pytest.mark.parametrize("form", FORMS)
def test_the_scale_of_a_returned_loss(form, close):
    model = WithLoss(FORMS[form])
    dots, scales = sample_dots(Net(), TRAIN, VAL, loss=F.cross_entropy)
    loss = lambda model, x, y: returned(form, model(x, y))
    engine = attached(model)
    for number in range(2):  # checked, and not
        close(step(engine, loss, 0.25, number, False), total(dots), 1e-10, total(scales))


@pytest.mark.parametrize("form", ["mapping", "tuple", "list", "number"])
def test_the_scale_of_a_loss_that_a_compiled_model_returns(form, close):
    torch._dynamo.reset()
    model = WithLoss(FORMS[form])
    dots, scales = sample_dots(Net(), TRAIN, VAL, loss=F.cross_entropy)
    engine, compiled = attached(model), torch.compile(model, backend=checked)
    loss = lambda model, x, y: returned(form, model(x, y))
    for number in range(3):
        scores = step(engine, loss, 0.25, number, False, model=compiled)
        close(scores, total(dots), 1e-10, total(scales))


def _distilled(model, x, y):
    logits, loss = model(x, y)
    return 0.3 * loss + 0.7 * F.cross_entropy(logits, y, reduction="mean", label_smoothing=0.1)


def test_a_returned_loss_beside_another_has_to_be_tracked(close):
    with pytest.raises(GraddotError, match="output of shape .* beside its loss.*track_loss"):
        step(attached(WithLoss(FORMS["tuple"])), _distilled, track=False)
    whole = lambda out, y: (
        0.3 * F.cross_entropy(out, y) + 0.7 * F.cross_entropy(out, y, label_smoothing=0.1)
    )
    dots, scales = sample_dots(Net(), TRAIN, VAL, loss=whole)
    scores = step(attached(WithLoss(FORMS["tuple"])), _distilled, 0.25)
    close(scores, total(dots), 1e-10, total(scales))


def test_a_loss_of_the_callers_own_has_to_be_tracked():
    """Were its scale taken for 1, scores would be a sixteenth of what they are."""
    with pytest.raises(GraddotError, match="scale cannot be told.*engine.track_loss"):
        step(attached(Net()), plain_loss, 0.25, track=False)


def test_two_tracked_losses_are_refused():
    engine = attached(Net())
    engine.attach_train_batch(*TRAIN, 0, None)
    loss = plain_loss(engine.model, *engine.prepare_forward_input(*TRAIN))
    (engine.track_loss(loss) + engine.track_loss(2 * loss)).backward()
    with pytest.raises(GraddotError, match="two losses were tracked"):
        engine.prepare_gradients()


def test_a_tracked_loss_that_is_no_number_is_refused():
    """The sum of the losses that it holds, or their weights, would be taken for its scale."""
    engine = attached(Net(), loss_reduction="sum")
    engine.attach_train_batch(*TRAIN, 0, None)
    x, y = engine.prepare_forward_input(*TRAIN)
    losses = F.cross_entropy(engine.model(x), y, reduction="none")
    with pytest.raises(GraddotError, match=r"a loss of shape \(6,\), whose scale cannot be told"):
        engine.track_loss(losses)


class Unreduced(Net):
    def forward(self, x, y):
        return {"loss": F.cross_entropy(super().forward(x), y, reduction="none")}


def test_a_returned_loss_that_is_no_number_has_to_be_tracked(close):
    loss = lambda model, x, y: model(x, y)["loss"].sum()
    with pytest.raises(GraddotError, match=r"the model's loss of shape \(6,\).*track_loss"):
        step(attached(Unreduced(), loss_reduction="sum"), loss, track=False)
    dots, scales = sample_dots(Net(), TRAIN, VAL, loss=F.cross_entropy)
    scores = step(attached(Unreduced(), loss_reduction="sum"), loss, 0.25)
    close(scores, total(dots), 1e-10, total(scales))
