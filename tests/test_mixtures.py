"""Mixtures whose experts are layers of their own, called on the tokens routed to them.

However their tokens are picked, scores and gradients are those of one float64 backward a sample. What
mixes samples, and what does not show which row a token is of, is refused by name.
"""

import contextlib

import grid_cells
import pytest
import torch
import torch.nn.functional as F
from brute_force import lm_loss, sample_dots, token_batch, total
from checked_backend import checked
from graddot_lm import GraddotError
from grid_cells import TRAIN, VAL, Cell, Subject
from loop_steps import attached, run
from model_zoo import VOCAB, Checkpointing, shaken
from test_grid import LOOPS
from test_models import check
from torch import nn
from torch._dynamo.utils import counters


class Gated(nn.Module):
    """An expert as most language models have it; weights multiply what it returns."""

    def __init__(self, d):
        super().__init__()
        self.gate, self.up, self.down = (
            nn.Linear(d, 6, bias=False),
            nn.Linear(d, 6),
            nn.Linear(6, d),
        )

    def forward(self, x, weights=1.0):
        return self.down(F.silu(self.gate(x)) * self.up(x)) * weights


class Mixture(nn.Module):
    """Experts that get the tokens where they are, token by token of the batch."""

    def __init__(self, d=8, experts=4, k=2, expert=Gated):
        super().__init__()
        self.router, self.k = nn.Linear(d, experts, bias=False), k
        self.experts = nn.ModuleList(expert(d) for _ in range(experts))

    def route(self, x):
        """Weights and numbers of every token's experts, (tokens, k)."""
        with torch.autocast(x.device.type, enabled=False):  # rounded, tokens go to other experts
            weights, chosen = self.router(x).softmax(-1).topk(self.k, -1)
        return weights / weights.sum(-1, keepdim=True), chosen

    def forward(self, x):
        flat = x.view(-1, x.shape[-1])
        weights, chosen = self.route(flat)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == e)
            added = self.run(expert, flat, token, weights[token, slot, None])
            out.index_add_(0, token, added.to(out.dtype))
        return out.view(x.shape)

    def run(self, expert, flat, token, weights):
        return expert(flat[token]) * weights


class BySlot(Mixture):
    """First choices, then second ones; experts without tokens are not called."""

    def forward(self, x):
        weights, chosen = self.route(x)
        out = torch.zeros_like(x)
        for k in range(self.k):
            for e, expert in enumerate(self.experts):
                here = chosen[..., k] == e
                if here.any():
                    out[here] = out[here] + weights[..., k][here][:, None] * expert(x[here])
        return out


class Sorted(Mixture):
    """Tokens sorted by expert, split, and put back."""

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = self.route(flat)
        order = chosen.flatten().argsort()
        counts = torch.bincount(chosen.flatten(), minlength=len(self.experts)).tolist()
        parts = flat[order // self.k].split(counts)
        out = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        out = torch.empty_like(out).index_copy(0, order, out).unflatten(0, chosen.shape)
        return (out * weights[..., None]).sum(1).view(x.shape)


class ByProducts(Mixture):
    """Tokens taken by a product with zeros and ones, as one row of a batch of one."""

    def run(self, expert, flat, token, weights):
        ones = F.one_hot(token, len(flat)).to(flat)
        return (expert((ones @ flat)[None]) * weights)[0]


class WithWeights(Mixture):
    def run(self, expert, flat, token, weights):
        return expert(flat[None, token].reshape(-1, flat.shape[-1]), weights)


class TokenByToken(Mixture):
    def forward(self, x):
        flat = x.flatten(0, 1)
        weights, chosen = self.route(flat)
        out = [
            sum(w * self.experts[e](token) for w, e in zip(ws, es.tolist(), strict=True))
            for token, ws, es in zip(flat, weights, chosen, strict=True)
        ]
        return torch.stack(out).view(x.shape)


class Routing(nn.ModuleDict):
    """The experts' dictionary has the forward that routes, as that of Switch Transformers."""

    def forward(self, flat, weights, chosen):
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.values()):
            token, slot = torch.where(chosen == e)
            added = (
                expert(flat[None, token].reshape(-1, flat.shape[-1])) * weights[token, slot, None]
            )
            out.index_add_(0, token, added.to(out.dtype))
        return out


class ByDictionary(Mixture):
    def __init__(self, d=8):
        super().__init__(d)
        self.experts = Routing({f"expert_{e}": expert for e, expert in enumerate(self.experts)})

    def forward(self, x):
        flat = x.view(-1, x.shape[-1])
        return self.experts(flat, *self.route(flat)).view(x.shape)


class OfRows(Mixture):
    """Each expert chooses three tokens of every row."""

    def forward(self, x):
        weights, out = self.router(x).softmax(-1), torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            w, token = weights[..., e].topk(3, 1)
            y = expert(torch.take_along_dim(x, token[..., None], 1)) * w[..., None]
            out = out.scatter_add(1, token[..., None].expand_as(y), y)
        return out


class Normed(Mixture):
    """The experts' tokens are of a norm's output, inside of the mixture, and one layer is for all."""

    def __init__(self, d=8):
        super().__init__(d)
        self.norm, self.shared = nn.LayerNorm(d), Gated(d)

    def forward(self, x):
        x = self.norm(x)
        return super().forward(x) + self.shared(x)


class InFloat32(Mixture):
    """Routes and adds up in it, whatever the model's dtype, as DeepSeek V3 in transformers 4."""

    def forward(self, x):
        flat = x.view(-1, x.shape[-1])
        weights, chosen = (x.float() if x.is_floating_point() else x for x in self.route(flat))
        out = torch.zeros_like(flat, dtype=weights.dtype)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == e)
            out.index_add_(0, token, expert(flat[token]) * weights[token, slot, None])
        return out.type(x.dtype).view(x.shape)


def normed_expert(d):
    return nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 6), nn.GELU(), nn.Linear(6, d))


class LanguageModel(Checkpointing):
    def __init__(self, mixture=Mixture, vocab=VOCAB, d=8, layers=2):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(vocab, d), nn.Linear(d, vocab)
        self.layers = nn.ModuleList(mixture() for _ in range(layers))

    def forward(self, ids):
        x = self.embedding(ids)
        for layer in self.layers:
            x = x + self.maybe_again(layer, x)
        return self.head(torch.tanh(x))


class OneLayerTwice(LanguageModel):
    def __init__(self):
        super().__init__(layers=1)
        self.layers.append(self.layers[0])


MODELS = {
    "where": LanguageModel,
    "by-slot": lambda: LanguageModel(BySlot),
    "sorted": lambda: LanguageModel(Sorted),
    "products": lambda: LanguageModel(ByProducts),
    "weights-inside": lambda: LanguageModel(WithWeights),
    "by-dictionary": lambda: LanguageModel(ByDictionary),
    "token-by-token": lambda: LanguageModel(lambda: TokenByToken(k=1), layers=1),
    "experts-choose-in-a-row": lambda: LanguageModel(OfRows),
    "norm-and-shared-expert": lambda: LanguageModel(Normed),
    "linear-experts": lambda: LanguageModel(lambda: Mixture(expert=lambda d: nn.Linear(d, d))),
    "norms-in-experts": lambda: LanguageModel(lambda: Sorted(expert=normed_expert)),
    "one-layer-twice": OneLayerTwice,
}
TRAIN_ROWS, VAL_ROWS = (
    token_batch(4, 11, VOCAB, seed=1, ragged=True),
    token_batch(2, 11, VOCAB, seed=2),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", MODELS)
def test_mixture(name, dtype, record_property):
    check(shaken(MODELS[name]()), TRAIN_ROWS, VAL_ROWS, dtype, record_property)


def test_a_mixture_that_routes_and_adds_up_in_float32(close):
    """It does not run in float64, in which it is proven; it is `Mixture` but for that."""
    model, exact = LanguageModel(InFloat32), LanguageModel()
    exact.load_state_dict(shaken(model).state_dict())
    want, scales = sample_dots(exact, TRAIN_ROWS, VAL_ROWS)
    engine = attached(model, VAL_ROWS)
    run(engine, TRAIN_ROWS)
    close(engine.aggregate_and_log(), total(want), 1e-5, total(scales))


# Every loop of test_grid.py


@pytest.mark.parametrize("loop", [name for name in LOOPS if name not in ("compiled", "padding")])
def test_loops(loop, monkeypatch, record_property):
    layers = 1 if loop in ("bf16", "fp16") else 2  # as above
    build = lambda: shaken(LanguageModel(vocab=30, layers=layers))
    subject = Subject(build, plain=True, vocab=30, label_shift=1)
    monkeypatch.setitem(grid_cells.SUBJECTS, f"{layers}-mixtures", subject)
    LOOPS[loop](Cell(f"{layers}-mixtures", record_property))


def test_compiled_around_the_mixtures(monkeypatch, record_property):
    """The sizes of what is routed depend on data: a mixture is left out of the graphs."""
    subject = Subject(lambda: shaken(LanguageModel()), plain=True, label_shift=1)
    monkeypatch.setitem(grid_cells.SUBJECTS, "mixture-to-compile", subject)
    torch.compiler.reset()
    counters.clear()
    cell = Cell("mixture-to-compile", record_property)
    cell.called = torch.compile(cell.model, backend=checked)
    cell.attach(VAL)
    for rows in (TRAIN, TRAIN[::-1], TRAIN):
        cell.model.zero_grad()
        cell.step(rows)
        cell.check_scores(VAL, rows)
        cell.check_gradient(rows)
    assert counters["stats"]["calls_captured"] > 0


class SkipsTheLast(BySlot):
    """Its last expert is not chosen until `all` is set."""

    all = False

    def route(self, x):
        weights = self.router(x)
        weights = weights if self.all else F.pad(weights[..., :-1], (0, 1), value=-100.0)
        return weights.softmax(-1).topk(self.k, -1)


def test_an_expert_that_is_first_chosen_later(close):
    model = shaken(LanguageModel(SkipsTheLast)).double()
    engine = attached(model, VAL_ROWS)
    for everyone in (False, True):
        for layer in model.layers:
            layer.all = everyone
        want, scales = sample_dots(model, TRAIN_ROWS, VAL_ROWS)
        run(engine, TRAIN_ROWS)
        close(engine.aggregate_and_log(), total(want), 1e-10, total(scales))
        model.zero_grad()


# Refused


class Capacity(Mixture):
    """Each expert takes its first ten tokens of the batch."""

    def run(self, expert, flat, token, weights):
        out = expert(flat[token[:10]]) * weights[:10]
        return F.pad(out, (0, 0, 0, len(token) - len(out)))


class Choosing(Mixture):
    """Each expert chooses nine tokens of the batch."""

    def forward(self, x):
        flat = x.view(-1, x.shape[-1])
        weights, out = self.router(flat).softmax(-1), torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            w, token = weights[:, e].topk(9)
            out.index_add_(0, token, expert(flat[token]) * w[:, None])
        return out.view(x.shape)


class Balanced(Mixture):
    """Weights are made alike over the tokens of the batch, as by Sinkhorn."""

    def route(self, x):
        weights = self.router(x).exp()
        for _ in range(3):
            weights = weights / weights.sum(0)
            weights = weights / weights.sum(1, keepdim=True)
        return weights.topk(self.k, -1)


class NextToken(Mixture):
    """What an expert returns goes to the next token of the batch."""

    def forward(self, x):
        return super().forward(x).flatten(0, 1).roll(1, 0).view(x.shape)


class Weighted(Mixture):
    def run(self, expert, flat, token, weights):
        return expert(flat[token] * weights)


class Buffered(Mixture):
    """Experts get their tokens in a buffer, with room for more."""

    def run(self, expert, flat, token, weights):
        buffer = torch.zeros_like(flat)
        buffer[: len(token)] = flat[token]
        return expert(buffer)[: len(token)] * weights


class Mean(Mixture):
    """An expert's tokens are the means of two tokens, of two rows perhaps."""

    def run(self, expert, flat, token, weights):
        x = flat[token]
        return expert((x + x.flip(0)) / 2) * weights


class Reversing(nn.Module):
    """The layer in the middle gets the tokens in another order."""

    def __init__(self, d):
        super().__init__()
        self.first, self.middle = nn.Linear(d, d), nn.Linear(d, d)

    def forward(self, x):
        return self.middle(self.first(x).flip(0)).flip(0)


class OwnScale(Mixture):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def route(self, x):
        weights, chosen = super().route(x)
        return weights * self.scale[chosen], chosen


class WithLoss(LanguageModel):
    """Adds what balances the experts to the loss."""

    def forward(self, ids, labels):
        loss = lm_loss(super().forward(ids), labels)
        share = self.layers[0].router(self.embedding(ids).flatten(0, 1)).softmax(-1).mean(0)
        return {"loss": loss + 0.1 * share.square().sum()}


OTHERS = r"gets an input \(of shape \(\d+, 8\)\) that depends on other samples"
COMPUTED = (
    r"for layers.0.experts.0\S* gets tokens of rows that are not known, with tokens of its input: expert"
    " layers.0.experts.0 gets tokens that were computed after"
)
REFUSED = {
    "capacity": (Capacity, OTHERS),
    "experts-choose": (Choosing, OTHERS),
    "balanced": (Balanced, OTHERS),
    "next-token": (NextToken, OTHERS),
    "weighted-before": (Weighted, COMPUTED),
    "buffers": (Buffered, COMPUTED),
    "means": (Mean, OTHERS),
    "reversed-inside": (
        lambda: Mixture(expert=Reversing),
        "training gradient of experts.0.middle.weight differs",
    ),
    "parameters-of-its-own": (OwnScale, "layers.0 has parameters of its own"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    mixture, reason = REFUSED[name]
    engine = attached(shaken(LanguageModel(mixture)), VAL_ROWS)
    with pytest.raises(GraddotError, match=reason):
        run(engine, TRAIN_ROWS)


def test_a_loss_that_balances_experts_is_refused():
    model = shaken(WithLoss())
    engine = attached(model, VAL_ROWS)
    engine.attach_train_batch(*TRAIN_ROWS, 0, torch.arange(4))
    with pytest.raises(
        GraddotError, match="what layer layers.0.router returns for a sample reaches"
    ):
        model(*engine.prepare_forward_input(*TRAIN_ROWS))


def test_scores_by_token_are_refused():
    model = shaken(LanguageModel())
    engine = attached(model, per_token=True)
    with contextlib.suppress(AssertionError):
        engine.set_directions(
            engine.compute_directions([VAL_ROWS], lambda m, x, y: lm_loss(m(x), y))
        )
    with pytest.raises(GraddotError, match="of which there are no scores by token"):
        run(engine, TRAIN_ROWS)
