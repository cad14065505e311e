"""nn.RNNCell, LSTMCell and GRUCell, called token by token, so that their weights have many uses."""

import pytest
import torch
from brute_force import gradient, lm_loss, sample_dots, token_batch, total
from engine_steps import run_step
from graddot_lm import GraddotError, GradDotProdEngine, check_layer
from test_recurrent import check_exact, check_norms
from torch import nn

CELLS = {
    "lstm": nn.LSTMCell,
    "gru": nn.GRUCell,
    "rnn": nn.RNNCell,
    "relu": lambda *sizes, **options: nn.RNNCell(*sizes, nonlinearity="relu", **options),
}
CELL = pytest.mark.parametrize("kind", CELLS)
TRAIN, VAL = token_batch(4, 7, seed=1, ragged=True), token_batch(2, 7, seed=2)


class Reader(nn.Module):
    """A language model that reads by two cells, the first from no state."""

    def __init__(self, kind, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(61, 9), nn.Linear(12, 61)
        self.start = nn.Parameter(torch.randn(12))
        self.first, self.second = (CELLS[kind](width, 12, bias=bias) for width in (9, 12))

    def forward(self, ids):
        h = lambda state: state[0] if isinstance(state, tuple) else state
        start = self.start.expand(len(ids), -1)
        second = (start, 0.1 * start) if isinstance(self.second, nn.LSTMCell) else start
        first, out = None, []
        for x in self.embed(ids).unbind(1):
            first = self.first(x, first)
            second = self.second(h(first), second)
            out.append(h(second))
        return self.head(torch.stack(out, 1))


@CELL
@pytest.mark.parametrize("rows", [2, 5, 6], ids="rows={}".format)
def test_a_cell(kind, rows):
    torch.manual_seed(0)
    state = torch.randn(2, rows, 5)
    check_layer(CELLS[kind](6, 5), torch.randn(rows, 6))
    given = tuple(state) if kind == "lstm" else state[0]
    check_layer(CELLS[kind](6, 5, bias=False), torch.randn(rows, 6), given)


@CELL
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_a_language_model(kind, bias, close):
    check_exact(Reader(kind, bias), TRAIN, VAL, close)


@CELL
def test_norms(kind, close):
    model = Reader(kind).double()
    engine = GradDotProdEngine(model, VAL, label_shift=1, norms=True)
    engine.attach()
    engine.attach_train_batch(*TRAIN, 0, None)
    x, y = engine.prepare_forward_input(*TRAIN)
    engine.track_loss(lm_loss(model(x), y)).backward()
    check_norms(engine, TRAIN, VAL, close)


@CELL
def test_bf16(kind):
    model = Reader(kind)
    dots, scales = sample_dots(model, TRAIN, VAL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores, _ = run_step(model, TRAIN, VAL)
    assert ((scores - total(dots)).abs() / total(scales)).max() <= 2e-2


class Alone(Reader):
    """Reads the rows one by one."""

    def forward(self, ids):
        return self.head(torch.stack([self.first(x[0])[None] for x in self.embed(ids)]))


def test_refusals():
    with pytest.raises(GraddotError, match="layer first gets an input .* does not hold them"):
        run_step(Alone("gru"), TRAIN, VAL)
    engine = GradDotProdEngine(Reader("gru"), label_shift=1, per_token=True)
    engine.attach()
    engine.set_directions(gradient(engine.model, *VAL))
    engine.attach_train_batch(*TRAIN, 0, None)
    by_token = "is used on 4 tokens of 4 rows; expected 7 a row.* leave per_token out"
    with pytest.raises(GraddotError, match=by_token):
        engine.track_loss(lm_loss(engine.model(TRAIN[0]), TRAIN[1])).backward()
