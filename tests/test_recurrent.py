"""nn.RNN, LSTM and GRU: against autograd, one sample at a time, and in whole language models."""

import copy

import pytest
import torch
import torch.nn.functional as F
from brute_force import gradient, lm_loss, sample_dots, token_batch, total
from checked_backend import checked
from engine_steps import run_step
from graddot_lm import GraddotError, GradDotProdEngine, check_layer
from graddot_lm.rules import recurrent
from loop_steps import attached, run, same_gradients
from torch import nn

KINDS = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn": nn.RNN,
    "relu": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
}
KIND = pytest.mark.parametrize("kind", KINDS)


class States(nn.Module):
    """What a recurrent layer returns, with the rows first, from a state that was made of its input."""

    def __init__(self, layer, given):
        super().__init__()
        self.layer, self.given, self.start = layer, given, nn.Linear(6, 5)

    def forward(self, x):
        state = None
        if self.given:
            sides = self.layer.num_layers * (1 + self.layer.bidirectional)
            state = self.start(x[:, :sides]).transpose(0, 1).contiguous()
            state = (state, state.tanh()) if isinstance(self.layer, nn.LSTM) else state
        out, end = self.layer(x, state)
        end = end if isinstance(end, tuple) else (end,)
        return out, *(part.transpose(0, 1) for part in end)


@KIND
@pytest.mark.parametrize("rows", [2, 4, 7], ids="rows={}".format)
@pytest.mark.parametrize("given", [False, True], ids=["", "given-state"])
@pytest.mark.parametrize("deep", [False, True], ids=["", "deep"])
def test_a_layer(kind, rows, given, deep):
    """Batches as long as there are tokens, or sides, among them."""
    options = {"num_layers": 2, "bidirectional": True, "bias": not given} if deep else {}
    torch.manual_seed(0)
    layer = States(KINDS[kind](6, 5, batch_first=True, **options), given)
    check_layer(layer, torch.randn(rows, 7, 6))


class Model(nn.Module):
    """A language model; its dropout does not hide from the first step's checks what lies behind."""

    def __init__(self, kind, batch_first, tied=False, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(61, 12), nn.Linear(12, 61, bias=not tied)
        self.layer = KINDS[kind](12, 12, num_layers=2, batch_first=batch_first, dropout=dropout)
        if tied:
            self.head.weight = self.embed.weight
        self.batch_first = batch_first

    def forward(self, ids):
        x = self.embed(ids)
        if self.batch_first:
            return self.head(self.layer(x)[0])
        return self.head(self.layer(x.transpose(0, 1))[0]).transpose(0, 1)


TRAIN, VAL = token_batch(4, 9, seed=1, ragged=True), token_batch(2, 9, seed=2)


def check_exact(model, train, val, close):
    """In float64 and fp32, gradients too, all parameters scored."""
    dots, scales = sample_dots(model, train, val)
    want = gradient(model, *train)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        trained = copy.deepcopy(model).to(dtype)
        scores, of_parameters = run_step(trained, train, val)
        close(scores, total(dots), tolerance, total(scales))
        same_gradients(trained, want, tolerance)
        assert set(of_parameters) == {name for name, _ in model.named_parameters()}


def check_norms(engine, train, val, close):
    """Of the engine's model in float64, after a step's backward."""
    model = engine.model
    scores = engine.aggregate_and_log()
    dots, scales = sample_dots(model, train, val)
    close(scores, total(dots), 1e-9, total(scales))
    rows = range(len(train[0]))
    own = [gradient(model, train[0][i : i + 1], train[1][i : i + 1]) for i in rows]
    norms = [torch.stack([g.norm() for g in grads.values()]).norm() for grads in own]
    close(engine.gradient_norms(), torch.stack(norms), 1e-9)


@KIND
@pytest.mark.parametrize("batch_first", [False, True], ids=["time-first", "rows-first"])
def test_a_language_model(kind, batch_first, close):
    check_exact(Model(kind, batch_first, tied=batch_first), TRAIN, VAL, close)


@KIND
def test_one_row_with_time_first(kind, close):
    """Its tokens lie as those of a row of (rows·T, D)."""
    model = Model(kind, False).double()
    engine = GradDotProdEngine(model, label_shift=1)
    engine.attach()
    for i, rows in enumerate((1, 4, 1)):
        engine.set_directions(gradient(model, *VAL))
        train = TRAIN[0][:rows], TRAIN[1][:rows]
        engine.attach_train_batch(*train, i, None)
        engine.track_loss(lm_loss(model(train[0]), train[1])).backward()
        dots, scales = sample_dots(model, train, VAL)
        close(engine.aggregate_and_log(), total(dots), 1e-9, total(scales))
        same_gradients(model, gradient(model, *train), 1e-9)
        model.zero_grad()


@KIND
@pytest.mark.parametrize("given", [False, True], ids=["", "given-state"])
def test_by_kernel(kind, given, close, monkeypatch):
    """As on a GPU."""
    monkeypatch.setattr(recurrent, "by_kernel", lambda gates: True)
    test_a_layer(kind, 4, given, True)
    test_a_language_model(kind, given, close)


@KIND
def test_one_direction_for_all_and_norms(kind, close):
    model = Model(kind, True).double()
    engine = GradDotProdEngine(model, label_shift=1, norms=True)
    engine.attach()
    loss = lambda model, x, y: lm_loss(model(x), y)
    engine.set_directions(engine.compute_directions([VAL], loss))
    engine.attach_train_batch(*TRAIN, 0, None)
    engine.track_loss(lm_loss(model(TRAIN[0]), TRAIN[1])).backward()
    check_norms(engine, TRAIN, VAL, close)


@KIND
def test_dots_by_token_of_the_way_back(kind):
    """A weight of the input has its part where there is one; one of the state has none at the token
    that has no state before it, which is the row's last."""
    torch.manual_seed(0)
    layer = KINDS[kind](4, 5, batch_first=True, bidirectional=True, bias=False).double()
    parts = {}
    for name in ("weight_ih_l0", "weight_ih_l0_reverse", "weight_hh_l0", "weight_hh_l0_reverse"):
        engine = GradDotProdEngine(layer, per_token=True, label_shift=0)
        engine.attach()
        directions = {n: torch.zeros_like(p) for n, p in layer.named_parameters()}
        engine.set_directions({**directions, name: torch.randn_like(directions[name])})
        x = torch.zeros(2, 6, 4, dtype=torch.float64)
        x[0, 1], x[1, 4] = 1, -1
        engine.attach_train_batch(x, torch.zeros(2, 6), 0, None)
        out = layer(x if "ih" in name else torch.ones_like(x))[0]
        engine.track_loss(out.square().mean()).backward()
        engine.prepare_gradients()
        parts[name] = engine.token_dots() != 0
        engine.detach()
    for name in ("weight_ih_l0", "weight_ih_l0_reverse"):
        assert parts[name].nonzero().tolist() == [[0, 1], [1, 4]]
    assert parts["weight_hh_l0"].all(0).tolist() == [False] + [True] * 5
    assert parts["weight_hh_l0_reverse"].all(0).tolist() == [True] * 5 + [False]


@KIND
def test_bf16(kind):
    model = Model(kind, True)
    dots, scales = sample_dots(model, TRAIN, VAL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        try:
            model(TRAIN[0])
        except RuntimeError as error:  # as on x86 without AVX-512
            pytest.skip(f"PyTorch has no such layer in bf16 for this processor: {error}")
        scores, _ = run_step(model, TRAIN, VAL)
    assert ((scores - total(dots)).abs() / total(scales)).max() <= 2e-2


@KIND
def test_compiled_model(kind, close):
    model = Model(kind, True)
    dots, scales = sample_dots(model, TRAIN, VAL)
    engine = GradDotProdEngine(model, VAL, label_shift=1)
    engine.attach()
    compiled = torch.compile(model, backend=checked)
    for step in range(3):
        engine.attach_train_batch(*TRAIN, step, None)
        x, y = engine.prepare_forward_input(*TRAIN)
        engine.track_loss(lm_loss(compiled(x), y)).backward()
        close(engine.aggregate_and_log(), total(dots), 1e-4, total(scales))
        model.zero_grad()


def test_frozen_weights_and_dropout(close):
    """What is frozen gets no gradient; dropout falls between the layers."""
    model = Model("lstm", True, dropout=0.5).double()
    for name in ("weight_hh_l0", "bias_ih_l1"):
        model.layer.get_parameter(name).requires_grad_(False)
    scores, of_parameters = run_step(model, TRAIN, VAL)
    assert scores.isfinite().all() and len(of_parameters) == 9
    assert model.layer.weight_hh_l0.grad is None and model.layer.bias_ih_l1.grad is None
    model.layer.dropout = 0.0
    model.zero_grad()
    scores, _ = run_step(model, TRAIN, VAL)
    dots, scales = sample_dots(model, TRAIN, VAL)
    close(scores, total(dots), 1e-9, total(scales))


class Packed(Model):
    def forward(self, ids):
        packed = nn.utils.rnn.pack_padded_sequence(
            self.embed(ids), torch.full((len(ids),), ids.shape[1]), batch_first=True
        )
        out = self.layer(packed)[0]
        return self.head(nn.utils.rnn.pad_packed_sequence(out, batch_first=True)[0])


class Words(nn.Module):
    """Reads words letter by letter, and then the text word by word: each row has several sequences."""

    def __init__(self, kind, batch_first=True):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(61, 12), nn.Linear(5, 3)
        self.letters = KINDS[kind](12, 4, batch_first=batch_first, bidirectional=True)
        self.words = KINDS[kind](8, 5, batch_first=True)

    def forward(self, x):  # (rows, words, letters)
        letters = self.embed(x).flatten(0, 1)
        if not self.letters.batch_first:
            letters = letters.transpose(0, 1)
        end = self.letters(letters)[1]
        end = end[0] if isinstance(end, tuple) else end  # (directions, rows · words, H)
        return self.head(self.words(end.transpose(0, 1).reshape(*x.shape[:2], -1))[0][:, -1])


def of_words(rows, seed):
    ids = token_batch(rows, 15, seed=seed)[0].unflatten(1, (3, 5))
    return ids, ids[:, 0, 0] % 3


@KIND
@pytest.mark.parametrize("n", [1, 3, 5], ids="n={}".format)
def test_rows_of_several_sequences(kind, n, close):
    """Batches of as many rows as there are directions, words and letters among them."""
    model, train, val = Words(kind).double(), of_words(n, 1), of_words(1, 2)
    dots, scales = sample_dots(model, train, val, loss=F.cross_entropy)
    want = gradient(model, *train, loss=F.cross_entropy)
    engine = attached(model, val, label_shift=0)
    run(engine, train, loss=F.cross_entropy)
    close(engine.aggregate_and_log(), total(dots), 1e-9, total(scales))
    same_gradients(model, want, 1e-9)


def test_refusals():
    with pytest.raises(GraddotError, match=r"letters gets an input .* one after the other"):
        run(attached(Words("gru", False), of_words(2, 2), label_shift=0), of_words(3, 1))
    with pytest.raises(GraddotError, match=r"layer gets an input .* one after the other"):
        run_step(Packed("lstm", True), TRAIN, VAL)
    with pytest.raises(GraddotError, match=r"memory\.weight_hr_l0: no rule for an LSTM with proj"):
        model = nn.ModuleDict({"memory": nn.LSTM(4, 4, proj_size=2)})
        GradDotProdEngine(model, VAL)
