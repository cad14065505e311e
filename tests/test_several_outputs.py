"""Losses of the caller's own by row, and of several outputs: CTC, more than one head, classes beside tokens."""

import functools

import pytest
import torch
import torch.nn.functional as F
from brute_force import gradient, lm_loss, sample_dots, token_batch, total
from engine_steps import close, run_step
from graddot_lm import GraddotError
from test_own_loss import TEXT, mean_of_means, net
from torch import nn


def speech(rows, seed):
    """Frames (rows, 14, 5), and texts of two to four labels."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(1, 6, (rows, 4), generator=g)
    labels[torch.arange(4) >= 2 + torch.arange(rows)[:, None] % 3] = -100
    return torch.randn(rows, 14, 5, generator=g).double(), labels


def ctc_loss(logits, labels, reduction="mean"):
    lengths = (labels != -100).sum(1)
    log_probs = logits.log_softmax(-1).transpose(0, 1)
    frames = torch.full_like(lengths, len(log_probs))
    return F.ctc_loss(log_probs, labels.clamp(min=0), frames, lengths, reduction=reduction)


def ctc_over_rows(logits, labels):
    return ctc_loss(logits, labels, "sum") / len(labels)


def ctc_over_tokens(logits, labels):
    return ctc_loss(logits, labels, "sum") / (labels != -100).sum()


@pytest.mark.parametrize("factor", [1.0, 1024.0])
def test_ctc_losses_are_added_up_as_expected(factor):
    """PyTorch's own mean is one of the rows' means."""
    train, val = speech(4, 1), speech(2, 2)
    for loss, text in [
        (ctc_loss, "weigh 0.04167 to 0.08333 in .* in a mean of rows' own means"),
        (ctc_over_rows, "weighs 0.1667 in .* divided by the number of rows or of all tokens"),
        (functools.partial(ctc_loss, reduction="sum"), "weighs 1 in .* as in a sum"),
    ]:
        with pytest.raises(GraddotError, match=text):
            run_step(net(6).double(), train, val, loss=loss, factor=factor, label_shift=0)
    scores, _ = run_step(
        net(6).double(), train, val, loss=ctc_over_tokens, factor=factor, label_shift=0
    )
    close(scores, total(sample_dots(net(6).double(), train, val, ctc_over_tokens)[0]), 1e-10)


def test_of_one_number_a_row_ctc_losses_are_a_mean_of_rows():
    (x, y), (xv, yv) = speech(4, 1), speech(2, 2)
    texts = torch.cat([y, yv])
    loss = lambda logits, rows: ctc_loss(logits, texts[rows])
    train, val = (x, torch.arange(4)), (xv, torch.arange(4, 6))
    model = net(6).double()
    scores, _ = run_step(model, train, val, loss=loss, label_shift=0)
    close(scores, total(sample_dots(net(6).double(), train, val, loss)[0]), 1e-10)
    for name, grad in gradient(net(6).double(), *train, loss=loss).items():
        assert torch.allclose(model.get_parameter(name).grad, grad, rtol=1e-10), name


class TwoOutputs(nn.Module):
    """Logits of two heads, or logits and the embeddings that they are made of, which every token uses."""

    def __init__(self, heads):
        super().__init__()
        torch.manual_seed(0)
        self.wte, self.mix = nn.Embedding(61, 8), nn.RNN(8, 8, batch_first=True, bidirectional=True)
        self.heads = nn.ModuleList([nn.Linear(16, 61) for _ in range(heads)])

    def forward(self, ids):
        embedded = self.wte(ids)
        hidden = self.mix(embedded)[0]
        logits = [head(hidden) for head in self.heads]
        return logits if len(logits) > 1 else (*logits, embedded)


def test_what_logits_are_made_of_is_taken_for_no_logits():
    loss = lambda out, labels: lm_loss(out[0], labels)
    model = TwoOutputs(1).double()
    scores, _ = run_step(model, *TEXT, loss=loss)
    close(scores, total(sample_dots(TwoOutputs(1).double(), *TEXT, loss)[0]), 1e-10)
    with pytest.raises(GraddotError, match="labelled tokens by its labels, but the loss used"):
        run_step(TwoOutputs(1).double(), *TEXT, loss=loss, label_shift=0)


@pytest.mark.parametrize("first", [0, 1])
def test_every_head_is_looked_at(first):
    """A loss of two heads, one of them a mean of rows' own means."""
    loss = lambda out, labels: mean_of_means(out[first], labels) + lm_loss(out[1 - first], labels)
    with pytest.raises(GraddotError, match="add up to one, as in a mean of rows' own means"):
        run_step(TwoOutputs(2).double(), *TEXT, loss=loss)
    both = lambda out, labels: 0.3 * lm_loss(out[0], labels) + lm_loss(out[1], labels)
    scores, _ = run_step(TwoOutputs(2).double(), *TEXT, loss=both)
    close(scores, total(sample_dots(TwoOutputs(2).double(), *TEXT, both)[0]), 1e-10)


@pytest.mark.parametrize("first", [0, 1])
def test_a_head_that_predicts_further_ahead_is_refused(first):
    """The mean over the second next tokens, of which a row has one less, is no mean over the next."""

    def loss(out, labels):
        further = out[first][:, :-2].transpose(1, 2), labels[:, 2:]
        return lm_loss(out[1 - first], labels) + 0.5 * F.cross_entropy(*further)

    with pytest.raises(GraddotError, match="several heads' losses have to be of the same tokens"):
        run_step(TwoOutputs(2).double(), *TEXT, loss=loss)


class WithClass(nn.Module):
    """Logits of tokens, and of a class of the row."""

    def __init__(self):
        super().__init__()
        self.model = TwoOutputs(1)
        self.classes = nn.Linear(8, 3)

    def forward(self, ids):
        logits, embedded = self.model(ids)
        return logits, self.classes(embedded.mean(1))


@pytest.mark.parametrize("part", [0.1, 1.0])
def test_a_class_of_rows_beside_tokens_is_no_mean_over_tokens(part):
    """But where rows have as many of them."""

    def loss(out, labels):
        classes = F.cross_entropy(out[1], labels[:, 0] % 3)
        return part * lm_loss(out[0], labels) + classes

    with pytest.raises(GraddotError, match="weighs 0.1667 in .* divided by the number of rows"):
        run_step(WithClass().double(), *TEXT, loss=loss)
    train, val = token_batch(4, 9, seed=1), token_batch(2, 9, seed=2)
    scores, _ = run_step(WithClass().double(), train, val, loss=loss)
    close(scores, total(sample_dots(WithClass().double(), train, val, loss)[0]), 1e-10)
