"""torch.compile of a whole model with an engine attached: scores, gradients, graphs and breaks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from brute_force import gradient, lm_loss, norm, sample_dots, tiny_gpt2, token_batch, total
from graddot_lm import GraddotError, GradDotProdEngine, fuse_head
from model_zoo import lora_of_experts
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    counters.clear()
    yield
    assert not counters["graph_break"], list(counters["graph_break"])


def graphs():
    return counters["stats"]["unique_graphs"]


def compiled(model, backend="aot_eager"):
    return torch.compile(model, backend=backend, fullgraph=True)


def in_a_function(model, backend="aot_eager"):
    """The model's hooks are then a part of the graph."""
    function = lambda *args, **kwargs: model(*args, **kwargs)
    return torch.compile(function, backend=backend, fullgraph=True)


def gpt2():
    return tiny_gpt2(layers=1)


def unscored(model):
    """A copy without compiled or fused forwards."""
    model = copy.deepcopy(model)
    model.__dict__.pop("forward", None)
    return model


def own_loss(engine, call, x, y, loss=lm_loss):
    out = call(x)
    return engine.track_loss(loss(getattr(out, "logits", out), y))


def its_loss(engine, call, x, y):
    return call(x, labels=y).loss


def step(engine, call, train, i=0, loss=own_loss, factor=1.0):
    """One micro-batch through the compiled model."""
    engine.attach_train_batch(*train, i, torch.arange(len(train[1])))
    (loss(engine, call, *engine.prepare_forward_input(*train)) * factor).backward()
    engine.prepare_gradients()


def check(engine, close, train, val, tolerance, loss=lm_loss):
    """Scores and .grad of a step that ran, against brute force."""
    model = unscored(engine.model)
    want, scales = sample_dots(model, train, val, loss=loss)
    close(engine.aggregate_and_log(), total(want), tolerance, total(scales))
    for name, g in gradient(model, *train, loss=loss).items():
        error = (engine.model.get_parameter(name).grad.double() - g).norm() / g.norm()
        assert error <= tolerance, name
    engine.model.zero_grad(set_to_none=True)


VAL = token_batch(2, 11, seed=99)


@pytest.mark.parametrize("way", [compiled, in_a_function])
def test_gpt2(way, close):
    """One graph for a shape, one more for all others; the first step runs uncompiled, and the first
    with padding."""
    model = gpt2().double()
    call = way(model)
    engine = GradDotProdEngine(model, VAL, label_shift=1, padding={"inputs": 0})
    engine.attach()
    seen = []
    for i, shape in enumerate([(4, 11), (4, 11), (4, 11), (3, 13), (3, 13), (5, 12)]):
        train = token_batch(*shape, seed=i, ragged=True)
        step(engine, call, train, i)
        check(engine, close, train, VAL, 1e-10)
        seen.append(graphs())
    assert seen == [0, 1, 1, 1, 2, 2]


def test_fused_head_accumulation_and_targets(close):
    """The head's backward leaves its part of the tied weight to the embedding's."""
    model = fuse_head(gpt2().double())
    call = in_a_function(model)
    vals = {"a": VAL, "b": token_batch(1, 11, seed=98)}
    engine = GradDotProdEngine(model, vals)
    engine.attach()
    for i in range(2):
        batches = [token_batch(3, 11, seed=2 * i + k, ragged=True) for k in range(2)]
        for batch in batches:
            step(engine, call, batch, i, its_loss, factor=0.5)
        plain = unscored(model)
        got = engine.aggregate_and_log()
        for row, val in zip(got, vals.values(), strict=True):
            parts = [sample_dots(plain, batch, val) for batch in batches]
            want, scale = (torch.cat([total(p[k]) for p in parts]) for k in (0, 1))
            close(row, want, 1e-10, scale)
        want = [gradient(plain, *batch) for batch in batches]
        for name, p in model.named_parameters():
            mean = (want[0][name] + want[1][name]) / 2
            assert (p.grad - mean).norm() <= 1e-10 * mean.norm(), name
        model.zero_grad(set_to_none=True)
    assert graphs() == 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_fused_head_without_scores(backend, close):
    """Regular training, evaluation in the midst of a scored step, and a label that is no token."""
    model = fuse_head(gpt2().double())
    call = compiled(model, backend)
    batches = [token_batch(rows, tokens, seed=rows) for rows, tokens in ((3, 11), (3, 11), (4, 12))]
    for ids, _ in batches:
        want = model(ids, labels=ids)
        (want.loss * 0.5).backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad(set_to_none=True)
        got = call(ids, labels=ids)
        (got.loss * 0.5).backward()
        torch.testing.assert_close(got.loss, want.loss)
        torch.testing.assert_close(got.token_losses, want.token_losses)
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, grads[name])
        model.zero_grad(set_to_none=True)
    assert graphs() == 2
    engine = GradDotProdEngine(model, VAL)
    engine.attach()
    for i in range(2):
        train = token_batch(3, 11, seed=i, ragged=True)
        engine.attach_train_batch(*train, i, torch.arange(3))
        with torch.no_grad():
            loss = call(train[0], labels=train[0]).loss
            torch.testing.assert_close(loss, model(train[0], labels=train[0]).loss)
        its_loss(engine, call, *engine.prepare_forward_input(*train)).backward()
        engine.prepare_gradients()
        check(engine, close, train, VAL, 1e-10)
    engine.detach()
    wrong = batches[0][0].clone()
    wrong[1, 2] = 61
    with pytest.raises(RuntimeError, match="a label is no token of the fused head"):
        call(batches[0][0], labels=wrong)


@pytest.mark.parametrize("fused", [False, True], ids=["own-head", "fused-head"])
def test_norms(fused, close):
    """Norms and cosines, cross terms of the tied weight among them."""
    model = gpt2().double()
    if fused:
        fuse_head(model)
    call = compiled(model)
    engine = GradDotProdEngine(model, VAL, norms=True)
    engine.attach()
    for i in range(2):
        train = token_batch(3, 11, seed=i, ragged=True)
        step(engine, call, train, i, its_loss)
        plain = unscored(model)
        dots, _ = sample_dots(plain, train, VAL)
        rows = [(train[0][k : k + 1], train[1][k : k + 1]) for k in range(3)]
        norms = torch.stack([norm(gradient(plain, *row)) for row in rows])
        # transformers computes the loss of its own head in fp32
        tolerance = 1e-10 if fused else 1e-6
        close(engine.gradient_norms(), norms, tolerance)
        cosines = total(dots) / norms / norm(gradient(plain, *VAL))
        close(engine.cosines(), cosines, tolerance, torch.full_like(cosines, 10))
        check(engine, close, train, VAL, tolerance)
    assert graphs() == 1


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config)


def test_llama_given_directions(close):
    """RMS norms; and the directions, of the plain model."""
    model = llama()
    call = compiled(model)
    engine = GradDotProdEngine(model, label_shift=1)
    engine.attach()
    loss = lambda model, inputs, labels: lm_loss(model(**inputs).logits, labels)
    for i in range(3):
        batch = {"input_ids": VAL[0]}, VAL[1]
        engine.set_directions(engine.compute_directions([batch], loss))
        train = token_batch(4, 11, seed=i)
        step(engine, call, train, i)
        check(engine, close, train, VAL, 1e-5)
    assert graphs() == 1


def test_lora_of_experts(close):
    """Adapters that set the experts' weights while a forward runs."""
    model = lora_of_experts(experts_implementation="grouped_mm")
    call, train = compiled(model), token_batch(4, 11, seed=1)
    want, scales = sample_dots(lora_of_experts(), train, VAL)
    engine = GradDotProdEngine(model, VAL, label_shift=1)
    engine.attach()
    for i in range(2):
        step(engine, call, train, i)
        close(engine.aggregate_and_log(), total(want), 1e-5, total(scales))
    assert graphs() == 1


class Norms(nn.Module):
    """Norms of both kinds, one over two dimensions, and linear layers, one without bias."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.norm, self.mix = nn.LayerNorm((2, 6)), nn.RMSNorm(12), nn.Linear(12, 12)
        self.plain, self.last = nn.LayerNorm(12, bias=False), nn.Linear(12, 7, bias=False)

    def forward(self, x):
        x = self.mix(self.norm(self.wide(x.view(-1, 2, 6)).flatten(1)))
        return self.last(self.plain(torch.tanh(x)))


@pytest.mark.parametrize("given", [False, True], ids=["riding", "given"])
def test_layers_that_the_graph_scores_itself(given, close):
    """No op of ours runs a rule; two targets, norms, and samples by micro-batches."""
    model = Norms().double()
    targets, seen = {"a": points(2, 99), "b": points(1, 98)}, []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    call = compiled(model, backend)
    engine = GradDotProdEngine(model, None if given else targets, norms=True)
    engine.attach()
    for i in range(3):
        batches = [points(4 + (i > 1), 2 * i + k) for k in range(2)]
        if given:
            engine.set_directions(
                {name: gradient(model, *val, loss=F.cross_entropy) for name, val in targets.items()}
            )
        for batch in batches:
            step(engine, call, batch, i, classify, factor=0.5)
        plain, rows = unscored(model), []
        for batch in batches:
            rows += [(batch[0][k : k + 1], batch[1][k : k + 1]) for k in range(len(batch[1]))]
        of_samples = [gradient(plain, *row, loss=F.cross_entropy) for row in rows]
        norms = torch.stack([norm(g) for g in of_samples])
        close(engine.gradient_norms(), norms, 1e-10)
        got = engine.aggregate_and_log()
        for row, val in zip(got, targets.values(), strict=True):
            parts = [sample_dots(plain, b, val, loss=F.cross_entropy) for b in batches]
            want, scale = (torch.cat([total(p[k]) for p in parts]) for k in (0, 1))
            close(row, want, 1e-10, scale)
        for name, p in model.named_parameters():
            mean = torch.stack([g[name] for g in of_samples]).mean(0)
            assert (p.grad - mean).norm() <= 1e-10 * mean.norm(), name
        model.zero_grad(set_to_none=True)
    assert seen and not [name for name in seen if "graddot_lm.layer" in name]


class Repeating(nn.Module):
    """A block, compiled alone, that runs as often as it is told."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.block, self.last, self.times = nn.Linear(12, 12), nn.Linear(12, 7), 1

    def forward(self, x):
        for _ in range(self.times):
            x = torch.tanh(self.block(x))
        return self.last(x)


def test_backward_for_some_tensors_only():
    """Whose graph computes all, and leaves the dots nowhere."""
    model, train = Norms().double(), points(5, 0)
    call = compiled(model)
    engine = GradDotProdEngine(model, points(2, 99))
    engine.attach()
    step(engine, call, train, 0, classify)
    engine.aggregate_and_log()
    engine.attach_train_batch(*train, 1, torch.arange(5))
    x, y = engine.prepare_forward_input(*train)
    engine.track_loss(F.cross_entropy(call(x), y)).backward(inputs=list(model.parameters()))
    with pytest.raises(GraddotError, match="call backward\\(\\) on the loss, without inputs="):
        engine.prepare_gradients()


def test_layer_that_runs_more_often_than_when_it_was_judged(close):
    """The cross terms of its uses would be missing: that step is refused, those after it are right."""
    model, val = Repeating().double(), points(2, 99)
    engine = GradDotProdEngine(model, val)
    engine.attach()
    model.block.compile(backend="aot_eager")
    for i, times in enumerate([1, 1, 2, 2, 1]):
        model.times, train = times, points(5, i)
        if i == 2:
            with pytest.raises(GraddotError, match="layer block ran otherwise in a compiled graph"):
                step(engine, model, train, i, classify)
            engine.clear_gradients()
            continue
        step(engine, model, train, i, classify)
        check(engine, close, train, val, 1e-10, loss=F.cross_entropy)


class Shared(nn.Module):
    """A weight of two embeddings and a head; layers called twice, also on the very same input."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.source, self.target = nn.Embedding(30, 10, padding_idx=3), nn.Embedding(30, 10, 3)
        self.mix, self.norm = nn.Linear(10, 10), nn.LayerNorm(10)
        self.head = nn.Linear(10, 30, bias=False)
        self.target.weight = self.source.weight
        self.head.weight = self.source.weight

    def forward(self, ids):
        x = self.source(ids) + 0.5 * self.target((7 * ids + 1) % 30) + self.source(ids)
        x = torch.tanh(self.mix(self.norm(x)) + self.mix(self.norm(x)))
        return self.head(torch.tanh(self.mix(self.norm(x))))


class Reused(nn.Module):
    """Layers in a loop, between which inductor writes into memory that is free again."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(30, 10), nn.Linear(10, 30)
        self.a, self.b = nn.Linear(10, 10), nn.Linear(10, 10)

    def forward(self, ids):
        x = self.embedding(ids)
        for _ in range(2):
            x = torch.tanh(self.a(torch.sin(x) * 1.5))
            x = x * torch.cos(self.b(x)) + x
        return self.head(x)


@pytest.mark.parametrize(
    ("model", "backend"), [(Shared, "aot_eager"), (Reused, "inductor")], ids=["shared", "reused"]
)
def test_parameters_with_several_uses(model, backend, close):
    """Calls that are the same to a compiler stay two; memory that it reuses is not ours."""
    model = model().double()
    call, val = compiled(model, backend), token_batch(2, 11, 30, seed=7)
    engine = GradDotProdEngine(model, val, label_shift=1)
    engine.attach()
    for i in range(3):
        train = token_batch(5, 11, 30, seed=i)
        step(engine, call, train, i)
        check(engine, close, train, val, 1e-10)
    assert graphs() == 1


class Positions(nn.Module):
    """Position ids that are the same for every row."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.positions = nn.Embedding(30, 10), nn.Embedding(32, 10)
        self.head = nn.Linear(10, 30)

    def forward(self, ids):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1])[None])
        return self.head(torch.tanh(x))


def test_tokens_and_a_batch_of_one_row(close):
    """The positions' output has rows that its input has not, and one row is no exception."""
    model, val = Positions().double(), token_batch(2, 11, 30, seed=7)
    call = compiled(model)
    engine = GradDotProdEngine(model, label_shift=1, per_token=True)
    engine.attach()
    engine.set_directions(gradient(model, *val))
    for i, rows in enumerate((3, 3, 1, 4)):
        train = token_batch(rows, 11, 30, seed=i)
        step(engine, call, train, i)
        tokens = engine.token_dots().sum(1)
        torch.testing.assert_close(tokens, sum_of_dots(model, train, val))
        check(engine, close, train, val, 1e-10)


def sum_of_dots(model, train, val):
    return total(sample_dots(unscored(model), train, val)[0])


class Scale(nn.Module):
    """A layer without a rule."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(12) + 0.5)

    def forward(self, x, scaled, y=None):
        return x * self.weight + y if scaled else y


class MLP(nn.Module):
    """Linear layers, a norm, a convolution, a layer of its own, checkpointed in part."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.scale = nn.Linear(12, 12), nn.LayerNorm(12), Scale()
        self.conv, self.last = nn.Conv1d(2, 3, 3, padding=1), nn.Linear(36, 7)

    def forward(self, x):
        x = checkpoint(lambda x: F.gelu(self.norm(self.first(x))), x, use_reentrant=False)
        x = self.scale(x, True, y=x)
        return self.last(torch.tanh(self.conv(torch.stack([x, x * x], 1)).flatten(1)))


def points(rows, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 12, generator=g).double(), torch.randint(0, 7, (rows,), generator=g)


def classify(engine, call, x, y):
    return own_loss(engine, call, x, y, F.cross_entropy)


def test_compiled_before_evaluation_within_and_detached_between(close):
    """None of these costs a graph a step, and without an engine all is as it was."""
    model, val = MLP().double(), points(2, 99)
    call = compiled(model)
    plain = gradient(model, *points(5, 0), loss=F.cross_entropy)
    seen = []
    engine = GradDotProdEngine(model, val)
    for i in range(4):
        F.cross_entropy(call(points(5, 0)[0]), points(5, 0)[1]).backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, plain[name])
        model.zero_grad(set_to_none=True)
        engine.reattach_after_evaluation()
        train = points(5, i)
        engine.attach_train_batch(*train, i, torch.arange(5))
        with torch.no_grad():
            torch.testing.assert_close(call(train[0]), unscored(model)(train[0]))
        classify(engine, call, *engine.prepare_forward_input(*train)).backward()
        engine.prepare_gradients()
        check(engine, close, train, val, 1e-10, loss=F.cross_entropy)
        engine.detach_for_evaluation()
        seen.append(graphs())
    assert seen[1] == seen[2] == seen[3] == seen[0] + 2  # with scores, and the evaluation


class Several(nn.Module):
    """A layer without a rule: nested tensors, a number and flags go in, tensors of which one has no
    gradient and one no rows, and None, come out."""

    def __init__(self):
        super().__init__()
        self.weight, self.table = (
            nn.Parameter(torch.rand(12) + 0.5),
            nn.Parameter(torch.rand(6, 12)),
        )

    def forward(self, pair, shift, *, entry=0, kind="square", mask=None):
        x, y = pair
        x = (x * self.weight).roll(shift, -1) + y
        return x, [x.argmax(-1), mask], self.table[None, entry].tanh()


class WithSeveral(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.several, self.head = nn.Embedding(30, 12), Several(), nn.Linear(12, 30)

    def forward(self, ids):
        x = self.tokens(ids)
        x, (largest, nothing), row = self.several((x, x * x), ids.shape[1], entry=1)
        assert nothing is None
        return self.head(torch.tanh(x) * row[:, None] + largest[..., None] / 12)


@pytest.mark.parametrize("way", [compiled, in_a_function])
def test_layer_of_several_inputs_and_outputs(way, close):
    """The number, which is that of the tokens, becomes a variable like it."""
    model, val = WithSeveral().double(), token_batch(2, 11, 30, seed=99)
    call = way(model)
    engine = GradDotProdEngine(model, label_shift=1)
    engine.attach()
    engine.set_directions(gradient(model, *val))
    for i, (rows, tokens) in enumerate([(5, 11), (5, 11), (5, 9), (5, 10), (6, 8), (1, 8), (1, 9)]):
        train = token_batch(rows, tokens, 30, seed=i)
        step(engine, call, train, i)
        check(engine, close, train, val, 1e-10)
    assert graphs() <= 4  # fixed, any number of tokens, any number of rows, one row


class Packed(nn.Module):
    """A layer that returns a mapping, which no graph is made to hold."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(12) + 0.5)

    def forward(self, x):
        return {"scaled": x * self.weight}


class WithPacked(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.packed, self.last = Packed(), nn.Linear(12, 7)

    def forward(self, x):
        return self.last(self.packed(x)["scaled"])


def test_layer_that_returns_a_mapping_breaks_the_graph(close):
    """It runs uncompiled: no wrong scores, and the break names us."""
    model, val = WithPacked().double(), points(2, 99)
    engine = GradDotProdEngine(model, val)
    engine.attach()
    call = torch.compile(model, backend="aot_eager")
    for i in range(3):
        train = points(5, i)
        step(engine, call, train, i, classify)
        check(engine, close, train, val, 1e-10, loss=F.cross_entropy)
    assert any("graddot: a scored layer" in reason for reason in counters["graph_break"])
    counters.clear()


class Choosing(nn.Module):
    """Layers without a rule whose forwards look at what they are given: whether two arguments are
    one tensor, whether one is their own parameter, a flag, a number's size."""

    class Same(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(12) + 0.5)

        def forward(self, x, y):
            return x * self.weight if x is y else y + x * self.weight**2

    class Given(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(12) + 0.5)

        def forward(self, x, weight):
            return x * weight if weight is self.weight else x + weight

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(12) + 0.5)

        def forward(self, x, both, long):
            x = x * self.weight if long else x + self.weight
            return (x, 2 * x) if both else x

    def __init__(self, given):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.head = nn.Embedding(30, 12), nn.Linear(12, 30)
        self.same, self.both = self.Same(), self.Both()
        self.given = self.Given() if given else None

    def forward(self, ids):
        x = self.tokens(ids)
        x = self.same(x, x) + self.same(x, torch.sin(x))
        x, twice = self.both(torch.tanh(x), True, ids.shape[1] > 5)
        x = self.both(x + twice, False, False)
        if self.given is not None:
            x = self.given(x, self.given.weight)
        return self.head(torch.tanh(x))


@pytest.mark.parametrize("way", [compiled, in_a_function])
def test_layer_that_looks_at_its_arguments(way, close):
    model, val = Choosing(given=False).double(), token_batch(2, 11, 30, seed=99)
    call = way(model)
    engine = GradDotProdEngine(model, label_shift=1)
    engine.attach()
    engine.set_directions(gradient(model, *val))
    for i, tokens in enumerate([11, 11, 9, 10, 12]):
        train = token_batch(5, tokens, 30, seed=i)
        step(engine, call, train, i)
        check(engine, close, train, val, 1e-10)


def test_layer_given_its_own_parameter(close):
    """It would be a tensor like others in a graph; the layer runs uncompiled."""
    model, val = Choosing(given=True).double(), token_batch(2, 11, 30, seed=99)
    call = torch.compile(model, backend="aot_eager")
    engine = GradDotProdEngine(model, val, label_shift=1)
    engine.attach()
    for i in range(3):
        train = token_batch(5, 11, 30, seed=i)
        step(engine, call, train, i)
        check(engine, close, train, val, 1e-10)
    assert any("graddot: a scored layer" in reason for reason in counters["graph_break"])
    counters.clear()


class Remembering(nn.Module):
    """A layer that leaves a tensor in an attribute."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(12) + 0.5)

    def forward(self, x):
        self.squares = (x * x).detach()
        return x * self.weight


class WithRemembering(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.remembering, self.last = nn.Linear(12, 12), Remembering(), nn.Linear(12, 7)

    def forward(self, x):
        x = self.remembering(torch.tanh(self.first(x)))
        return self.last(x + self.remembering.squares)


def test_layer_that_leaves_a_tensor_in_an_attribute(close):
    """The model reads it after, which a graph in which the layer is one op would not see."""
    model, val = WithRemembering().double(), points(2, 99)
    engine = GradDotProdEngine(model, val)
    engine.attach()
    call = torch.compile(model, backend="aot_eager")
    for i in range(3):
        train = points(5, i)
        step(engine, call, train, i, classify)
        check(engine, close, train, val, 1e-10, loss=F.cross_entropy)
    assert any("graddot: a scored layer" in reason for reason in counters["graph_break"])
    counters.clear()


@pytest.mark.parametrize("model", [MLP, Positions, WithSeveral, gpt2])
def test_batches_of_one_row_come_first(model, close):
    """As with a batch size of one and given directions; more rows may come later."""
    model = model().double()
    tokens = not isinstance(model, MLP)
    loss, run = (lm_loss, own_loss) if tokens else (F.cross_entropy, classify)
    batch = (lambda rows, seed: token_batch(rows, 11, 30, seed=seed)) if tokens else points
    call = compiled(model)
    engine = GradDotProdEngine(model, label_shift=1 if tokens else 0)
    engine.attach()
    engine.set_directions(gradient(model, *batch(2, 99), loss=loss))
    for i, rows in enumerate((1, 1, 4, 4, 1, 3)):
        train = batch(rows, i)
        step(engine, call, train, i, run)
        check(engine, close, train, batch(2, 99), 1e-10, loss=loss)
    assert graphs() <= 3


class Attending(nn.Module):
    """A transformer layer with time first or not."""

    def __init__(self, batch_first):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.head = nn.Embedding(30, 12), nn.Linear(12, 30)
        self.layer = nn.TransformerEncoderLayer(12, 2, 16, 0.0, batch_first=batch_first)
        self.batch_first = batch_first

    def forward(self, ids):
        x = self.tokens(ids)
        x = self.layer(x) if self.batch_first else self.layer(x.transpose(0, 1))
        return self.head(x if self.batch_first else x.transpose(0, 1))


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_in_evaluation_and_of_as_many_tokens_as_rows(batch_first, close):
    """In eval() PyTorch's attention has another way, whose outputs are others, where nothing needs a
    gradient; and with time first T says nothing of the rows."""
    model, val = Attending(batch_first).double().eval(), token_batch(2, 5, 30, seed=7)
    call = compiled(model)
    engine = GradDotProdEngine(model, val, label_shift=1)
    engine.attach()
    for i, rows in enumerate((3, 4, 3, 2, 4)):
        train = token_batch(rows, 5, 30, seed=i)
        step(engine, call, train, i)
        check(engine, close, train, val, 1e-10)


def test_autocast():
    """The graph is traced under autocast, and runs outside of it."""
    model, val = MLP(), points(2, 99)
    call = compiled(model)
    engine = GradDotProdEngine(model, (val[0].float(), val[1]))
    engine.attach()
    for i in range(2):
        train = points(5, i)
        want, scales = sample_dots(unscored(model), train, val, loss=F.cross_entropy)
        with torch.autocast("cpu", torch.bfloat16):
            step(engine, call, (train[0].float(), train[1]), i, classify)
        error = (engine.aggregate_and_log() - total(want)).abs() / total(scales)
        assert error.max() <= 2e-2
        model.zero_grad()
    assert graphs() == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dots_are_not_rounded_where_autocast_is_left_open(dtype):
    """Around backward and prepare_gradients too: the same activations and gradients give the same
    scores, whether the dots are made in a graph, or after the backward for many vectors at once."""
    scores, val = [], (points(2, 99)[0].float(), points(2, 99)[1])
    for way in (lambda model: model, compiled):
        model = Norms()
        call = way(model)
        engine = GradDotProdEngine(model, val)
        engine.attach()
        for i in range(2):
            x, y = points(5, i)
            with torch.autocast("cpu", dtype):
                step(engine, call, (x.float(), y), i, classify)
            scores.append(engine.aggregate_and_log())
            model.zero_grad()
    torch.testing.assert_close(scores[3], scores[1], rtol=1e-5, atol=0)
    assert graphs() == 1


@pytest.mark.parametrize("way", [compiled, in_a_function])
def test_refusals(way):
    model = MLP().double()
    call = way(model)
    engine = GradDotProdEngine(model, points(2, 99))
    engine.attach()
    step(engine, call, points(5, 0), 0, classify)
    engine.aggregate_and_log()
    hook = model.conv.weight.register_hook(lambda grad: 2 * grad)
    with pytest.raises(GraddotError, match="layer conv has a parameter with a gradient hook"):
        step(engine, call, points(5, 1), 1, classify)
    hook.remove()
    engine.clear_gradients()
    train = points(5, 2)
    engine.attach_train_batch(*train, 2, torch.arange(5))
    x, _ = engine.prepare_forward_input(*train)
    call(x)
    with pytest.raises(GraddotError, match="the model ran twice since attach_train_batch"):
        call(x)


def test_a_first_step_that_is_given_up_keeps_nothing_uncompiled():
    """Without an engine any more; the model stays attached, as an exception leaves it."""
    model, other = MLP().double(), MLP().double()
    engine = GradDotProdEngine(model, points(2, 99))
    engine.attach()
    train = points(5, 0)
    engine.attach_train_batch(*train, 0, torch.arange(5))
    x, _ = engine.prepare_forward_input(*train)
    model(x)
    call = compiled(other)
    call(x)
    assert graphs() == 0, "the checks of a first step are of what runs uncompiled"
    del engine
    call(x)
    assert graphs() == 1
