"""Single layers: which rule they get, check_layer's proof, layers taught by a user, refusals."""

import copy
import functools
import random

import pytest
import torch
import torch.nn.functional as F
from brute_force import sample_dots, total
from engine_steps import check_against_brute_force, close, run_step
from graddot_lm import GraddotError, GradDotProdEngine, check_layer, register_layer
from graddot_lm.checks import layer_proof
from graddot_lm.rules.norms import RMSNormForm, rms_norm_form
from graddot_lm.rules.table import rule_for
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

X = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0))


class Scale(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape))
        self.eps = 1e-6

    def forward(self, x):
        return x * self.weight


class ByMaximum(Scale):
    """Nearly an RMS norm."""

    def forward(self, x):
        return x * torch.rsqrt(x.square().amax(-1, keepdim=True) + self.eps) * self.weight


class Doubled(nn.Linear):
    """Overrides the forward, and uses its weight in it as a linear layer."""

    def forward(self, x):
        return 2 * super().forward(x)


class Squared(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.square(), self.bias)


class RouterInFp32(nn.Linear):
    """Its weight is kept in fp32, and it computes in that, whatever its input is."""

    def forward(self, x):
        return F.linear(x.to(torch.float32), self.weight).softmax(-1)


class Moved(nn.Embedding):
    def forward(self, ids):
        return 2 * super().forward(ids + 1)


class Tilted(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x + 1)


class Renamed(nn.Linear):
    pass


class ByHand(Scale):
    """An RMS norm whose eps stands in its forward."""

    def __init__(self, *shape):
        super().__init__(*shape)
        del self.eps

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight


class MixesSamples(Scale):
    def forward(self, x):
        return (x - x.mean(0)) * self.weight


class FirstRowOnly(Scale):
    """A table of shape (1, ...) that is not used row by row when it has several."""

    def forward(self, x):
        return x * self.weight[0]


class Cell(nn.Module):
    """A layer inside, and a parameter used where rows come second, which cannot be followed."""

    def __init__(self):
        super().__init__()
        self.inner, self.weight = nn.Linear(6, 6), nn.Parameter(torch.randn(6))

    def forward(self, x):
        return (self.inner(x).transpose(0, 1) * self.weight).transpose(0, 1)


@pytest.mark.parametrize(
    "layer, form",
    [
        (LlamaRMSNorm(6, eps=1e-5), RMSNormForm(1e-5, 0.0)),
        (T5LayerNorm(6), RMSNormForm(1e-6, 0.0)),
        (GemmaRMSNorm(6, eps=1e-3), RMSNormForm(1e-3, 1.0)),
        (nn.RMSNorm(6, eps=1e-2), RMSNormForm(1e-2, 0.0)),
        (nn.RMSNorm(6), RMSNormForm(None, 0.0)),
        (ByHand(6), RMSNormForm(1e-5, 0.0)),
        (ByMaximum(6), None),
        (Scale(6), None),
        (nn.LayerNorm(6, bias=False), None),
        (nn.RMSNorm((5, 6)), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_rms_norms_are_known_by_what_they_compute(layer, form):
    with torch.no_grad():
        next(layer.parameters()).normal_()
    assert rms_norm_form(layer) == form
    check_layer(layer, X)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [LlamaRMSNorm, GemmaRMSNorm, T5LayerNorm, nn.RMSNorm])
def test_rms_norm_gives_the_values_of_its_own_forward(norm, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), norm(6)).to(dtype)
    x, y = X[:, 0].to(dtype), torch.zeros(4, dtype=torch.long)
    engine = GradDotProdEngine(model, (x[3:], y[3:]), label_shift=0)
    engine.attach()
    engine.attach_train_batch(x[:3], y[:3], 0, None)
    assert torch.equal(model(x), copy.deepcopy(model)(x))


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.GroupNorm(3, 6), (6, 5)),
        (nn.InstanceNorm1d(6, affine=True), (6, 5)),
        (nn.BatchNorm1d(6).eval(), (6, 5)),
        (nn.PReLU(6), (6, 5)),
        (nn.Bilinear(6, 6, 3), None),
        (nn.Conv1d(6, 4, 3, groups=2), (6, 5)),
        (nn.Conv1d(6, 4, 3, padding_mode="reflect", padding=2), (6, 5)),
        (nn.Conv2d(6, 4, 3, stride=2, padding=1, dilation=2), (6, 5, 7)),
        (nn.Conv3d(2, 3, 2), (2, 3, 4, 5)),
        (nn.ConvTranspose1d(6, 4, 3), (6, 5)),
        (nn.RMSNorm((5, 6)), (5, 6)),
        (nn.LayerNorm((5, 6)), (5, 6)),
        (nn.Linear(6, 3), (6,)),
        (Renamed(6, 3), (5, 6)),
        (Doubled(6, 3), (5, 6)),
        (Squared(6, 3), (5, 6)),
        (RouterInFp32(6, 3, bias=False), (5, 6)),
        (Tilted(6), (5, 6)),
        (Scale(1, 5, 6), (5, 6)),
        (FirstRowOnly(1, 6), (5, 6)),
        (Cell(), (5, 6)),
        (nn.MultiheadAttention(6, 2, batch_first=True), None),
        (nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), (5, 6)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_check_layer_proves(layer, shape):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
    before = {n: v.clone() for n, v in layer.state_dict().items()}
    three = isinstance(layer, nn.MultiheadAttention)
    inputs = [torch.randn(4, *(shape or (5, 6))) for _ in range(1 if shape else 3 if three else 2)]
    check_layer(layer, *inputs)
    assert all(torch.equal(v, before[n]) for n, v in layer.state_dict().items())
    assert "forward" not in layer.__dict__ and all(p.grad is None for p in layer.parameters())


def test_an_embedding_that_overrides_its_forward():
    ids = torch.randint(0, 8, (4, 5), generator=torch.Generator().manual_seed(0))
    check_layer(Moved(9, 4), ids)
    check_layer(Moved(9, 4, padding_idx=3), ids)


def test_a_subclass_that_keeps_the_forward_has_its_base_rule():
    assert rule_for(Renamed(6, 3)) is rule_for(nn.Linear(6, 3))


@pytest.mark.parametrize(
    "layer, match",
    [
        (MixesSamples(6), "has an output .* that depends on other samples"),
        (nn.BatchNorm1d(5), "has an output .* that depends on other samples"),
        (nn.LSTM(6, 6, batch_first=True, proj_size=3), "no rule for an LSTM with projections"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_check_layer_refuses(layer, match):
    with pytest.raises(GraddotError, match=match):
        check_layer(layer, X)


def test_a_layer_that_is_taught():
    class Gate(Scale):
        pass

    @register_layer(Gate)
    def gate(module, scored, x):
        return x * scored.per_sample(module.weight)[:, None]

    assert rule_for(Gate(6)) is gate
    check_layer(Gate(6), X)


def wrong(rule):
    class Layer(nn.Linear):
        pass

    register_layer(Layer, rule)
    return Layer(6, 6)


@pytest.mark.parametrize(
    "rule, match",
    [
        (lambda m, s, x: 1.1 * s.linear(x, m.weight, m.bias), "output 0 of sample 3"),
        (lambda m, s, x: s.linear(x.detach(), m.weight, m.bias), "gradient of input 0, sample 3"),
        (lambda m, s, x: s.linear(x, m.weight.detach(), m.bias), "training gradient of weight"),
        (lambda m, s, x: F.linear(x, m.weight, m.bias), "training gradient of weight"),
        (lambda m, s, x: s.linear(x, m.weight, m.bias).flatten(0, 1), "outputs of shapes"),
    ],
    ids=["output", "input-gradient", "no-gradient", "unscored", "shape"],
)
def test_check_layer_names_what_is_wrong(rule, match):
    with pytest.raises(GraddotError, match=match):
        check_layer(wrong(rule), X)


def test_a_long_proof_is_announced(monkeypatch, caplog):
    data = lambda rows: (torch.randn(rows, 6), torch.arange(rows) % 6)
    for largest in (2**24, 20):
        monkeypatch.setattr(layer_proof, "LARGE", largest)
        model = nn.Sequential(ByMaximum(6), nn.Linear(6, 6))
        model[0].more = nn.Parameter(torch.randn(30), requires_grad=False)
        run_step(model, data(4), data(2), loss=F.cross_entropy, label_shift=0)
        told = "layer 0 of type ByMaximum, of 0 million parameters, is proven now, once, on"
        assert (told in caplog.text) == (largest == 20)


class Wide(Scale):
    """Too large for float64."""

    def forward(self, x):
        if x.dtype == torch.float64:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.\n(more)")
        return super().forward(x)


def test_a_layer_without_memory_for_its_proof_is_told_what_to_do():
    told = r"Tried to allocate 9.00 GiB\.\. It is proven on \d+ rows in float64.* batch of shorter rows"
    with pytest.raises(GraddotError, match=told):
        check_layer(Wide(6), X)


def test_check_layer_sees_dots_given_to_the_wrong_samples():
    class Swapped(torch.autograd.Function):
        @staticmethod
        def forward(ctx, copies):
            return copies.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad[[1, 0, *range(2, len(grad))]]

    class Layer(Scale):
        pass

    register_layer(Layer, lambda m, s, x: x * Swapped.apply(s.per_sample(m.weight))[:, None])
    with pytest.raises(GraddotError, match="dot product of weight with sample 0"):
        check_layer(Layer(6), X)


def _refused(model, match, x=X):
    y = torch.zeros(len(x), dtype=torch.long)
    run = functools.partial(
        run_step, model, (x[:3], y[:3]), (x[3:], y[3:]), loss=_first_token, label_shift=0
    )
    with pytest.raises(GraddotError, match=match):
        run()


def _first_token(out, y):
    return F.cross_entropy(out.flatten(1), y)


def test_models_that_mix_samples_are_refused():
    frozen = nn.BatchNorm1d(5).requires_grad_(False)
    _refused(nn.Sequential(frozen, nn.Linear(6, 2)), "layer 0: BatchNorm in training mode|layer 1")
    _refused(nn.Sequential(nn.Linear(6, 2), nn.BatchNorm1d(5, affine=False)), "has an output")
    _refused(nn.Sequential(nn.Linear(6, 6), MixesSamples(6)), "has an output")
    mixed = nn.Sequential(nn.Linear(6, 6), MixesSamples(6), nn.Linear(6, 2))
    _refused(mixed, "layer 2 gets an input")


class MixesALittle(nn.Module):
    def forward(self, x):
        return x + 5e-3 * x.mean(0)


def test_a_model_that_mixes_samples_a_little_is_refused():
    """By less than what 16 bits make of the same rows in another batch."""
    mixed = nn.Sequential(nn.Linear(6, 6), MixesALittle(), nn.Linear(6, 2))
    _refused(mixed, "layer 2 gets an input")


def test_a_layer_too_large_for_its_samples_gradients_is_refused(monkeypatch):
    monkeypatch.setattr("graddot_lm.rules.general.LARGEST", 40)
    model = nn.Sequential(nn.Linear(6, 6), Cell())
    _refused(model, r"layer 1 of type Cell.*\n.*\n  row by row: its 48 elements are too many")
    register_layer(Cell)
    check_layer(model, X)


class FirstOfPositions(nn.Module):
    """Uses the first row of its positions for all samples, which no shape shows, nor, with noise of
    its own, what it returns."""

    def __init__(self):
        super().__init__()
        self.positions, self.head = nn.Embedding(5, 6), nn.Linear(6, 2)
        self.noise = random.Random(0)  # not two draws that are close by chance

    def forward(self, x):
        out = self.head(x + self.positions(torch.arange(5)[None])[0])
        return out + self.noise.random()


class SparseExperts(nn.Module):
    """One layer an expert, called with the tokens that chose it."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(6, 2)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x):
        chosen, out = self.gate(x).argmax(-1), torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out[chosen == e] = expert(x[chosen == e])
        return out


class SkippedExpert(nn.Module):
    """Its second expert first runs in the second step, with as many tokens as there are rows."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.tokens = nn.Linear(6, 6), nn.Linear(6, 6), 0

    def forward(self, x):
        out = self.first(x)
        if self.tokens:
            out[0, : self.tokens] = self.second(x[0, : self.tokens])
        return out


class OneLayerTwoWays(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        return self.linear(self.linear(x).flatten(0, 1)).view(x.shape)


def test_inputs_without_rows_are_refused_by_name():
    _refused(FirstOfPositions(), "layer positions got an input without rows")
    _refused(SparseExperts(), "layer experts.0 gets an input")
    unused = SparseExperts()
    torch.nn.init.constant_(unused.gate.bias[:1], 100.0)
    _refused(unused, r"layer experts.1 gets an input \(of shape \(0, 6\)\)")
    _refused(OneLayerTwoWays(), "layer linear is called several times")


class BiasBeside(nn.Linear):
    """Leaves it to the layer around to add the bias."""

    def forward(self, x):
        return F.linear(x, self.weight), self.bias


class PositionsOf(nn.Embedding):
    """Of its input it looks at the length alone."""

    def forward(self, x):
        return super().forward(torch.arange(x.shape[1]))


class AroundThem(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.dense, self.positions, self.head = (
            BiasBeside(6, 6),
            PositionsOf(9, 6),
            nn.Linear(6, 5),
        )

    def forward(self, x):
        out, bias = self.dense(x + self.positions(x))
        return self.head(torch.tanh(out + bias).mean(1))


@pytest.mark.parametrize("rows", [6, 7])
@pytest.mark.parametrize("inside", [False, True])
def test_layers_that_return_what_has_no_rows(inside, rows):
    """They are followed in the layer around; of 7 tokens."""
    model = nn.Sequential(AroundThem(), nn.Tanh()) if inside else AroundThem()
    x, y = (
        torch.randn(rows, 7, 6, generator=torch.Generator().manual_seed(1)),
        torch.arange(rows) % 5,
    )
    check_against_brute_force(
        model, (x[:4], y[:4]), (x[4:], y[4:]), torch.float64, loss=F.cross_entropy, label_shift=0
    )


def test_a_layer_that_first_runs_later_is_not_guessed():
    model, y = SkippedExpert(), torch.zeros(4, dtype=torch.long)
    engine = GradDotProdEngine(model, (X[3:], y[3:]), label_shift=0)
    engine.attach()
    for model.tokens in (0, 4):
        engine.attach_train_batch(X[:3], y[:3], 0, None)
        if model.tokens:
            with pytest.raises(
                GraddotError, match=r"layer second gets an input \(of shape \(4, 6\)\)"
            ):
                model(X)
        else:
            engine.track_loss(_first_token(model(X), y)).backward()
            engine.prepare_gradients()


def test_a_forward_replaced_on_the_instance_is_refused():
    model = nn.Sequential(nn.Linear(6, 2))
    model[0].forward = lambda x: x[..., :2]
    _refused(model, "0.weight: its forward was replaced on the instance")


class Recorded(nn.Module):
    """Puts a function around the forward of its layer while it runs, as transformers 4 does where outputs
    are recorded."""

    def __init__(self, wraps):
        super().__init__()
        self.inner, self.head, self.wraps = Scale(6), nn.Linear(6, 3), wraps

    def forward(self, x):
        own, seen = self.inner.forward, []

        def recorded(x):
            seen.append(own(x))
            return seen[-1]

        self.inner.forward = functools.wraps(own)(recorded) if self.wraps else recorded
        try:
            return self.head(self.inner(x)).mean(1)
        finally:
            self.inner.forward = own


def test_a_layer_whose_forward_is_wrapped_as_the_model_runs():
    model, y = Recorded(wraps=True).double(), torch.arange(4) % 3
    train, val = (X[:3].double(), y[:3]), (X[3:].double(), y[3:])
    loss = F.cross_entropy
    dots, scales = sample_dots(model, train, val, loss=loss)
    scores, _ = run_step(model, train, val, loss=loss, label_shift=0)
    close(scores, total(dots), 1e-10, total(scales))
    with pytest.raises(GraddotError, match="layer inner of type Scale has got a forward that"):
        run_step(Recorded(wraps=False).double(), train, val, loss=loss, label_shift=0)


class SharedWithNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.linear = Scale(6, 6), nn.Linear(6, 6)
        self.linear.weight = self.scale.weight

    def forward(self, x):
        return self.linear(self.scale(x))


def test_uses_of_two_kinds_are_refused():
    x = X[:, 0, None].expand(4, 6, 6).contiguous()
    _refused(SharedWithNorm(), "weight is shared by a linear layer", x)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv1d(6, 6, 3, padding=1), LlamaRMSNorm(6)
        self.scale, self.head = Scale(6), nn.Linear(6, 3)

    def block(self, x):
        return self.scale(self.norm(torch.tanh(self.conv(x.transpose(1, 2)).transpose(1, 2))))

    def forward(self, x):
        return self.head(checkpoint(self.block, self.block(x), use_reentrant=False).mean(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_activation_checkpointing(dtype):
    model, y = Checkpointed(), torch.tensor([0, 1, 2, 0])
    train, val = (X[:3], y[:3]), (X[3:], y[3:])
    dots, scales = sample_dots(model, train, val, loss=F.cross_entropy)
    exact = copy.deepcopy(model).to(dtype)
    parts = [(x.to(dtype), y) for x, y in (train, val)]
    scores, _ = run_step(exact, *parts, loss=F.cross_entropy, label_shift=0)
    if dtype == torch.float64:
        close(scores, total(dots), 1e-5, total(scales))
    else:
        assert ((scores - total(dots)).abs() / total(scales)).max() <= 2e-2


def test_random_state_is_left_alone():
    """The runs that look at a model draw nothing: training goes on as without them."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), Scale(6))
    torch.manual_seed(1)
    y = torch.zeros(4, dtype=torch.long)
    engine = GradDotProdEngine(model, (X[3:], y[3:]), label_shift=0)
    engine.attach()
    engine.attach_train_batch(X[:3], y[:3], 0, None)
    got = model(X)
    torch.manual_seed(1)
    assert torch.equal(got, copy.deepcopy(model)(X))
