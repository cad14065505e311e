"""Models as they come: random weights, two layers, dots and gradients against brute force.

Each case is compared with one float64 backward a sample, in fp32 and in float64. The bound is one
for both: most of these models compute norms, rotary angles and softmax in fp32 whatever they hold.
"""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from brute_force import gradient, lm_loss, sample_dots, token_batch, total
from engine_steps import run_step
from graddot_lm import GraddotError, GradDotProdEngine, check_layer
from loop_steps import mapping_dots, mapping_gradient
from model_zoo import (
    LANGUAGE_MODELS,
    OTHER_MODELS,
    VOCAB,
    OneSequence,
    Scale,
    Tokens,
    WithMask,
    adapters,
    causal,
    deepseek_v3,
    moe,
    shaken,
    t5,
)
from torch import nn
from transformers.utils import ModelOutput

TOLERANCE = 1e-5  # as in engine_steps.py, with the denominator explained there


def check(model, train, val, dtype, record, *, loss=lm_loss, label_shift=1):
    want, scales = sample_dots(model, train, val, loss=loss)
    want_grad = gradient(model, *train, loss=loss)
    model = copy.deepcopy(model).to(dtype)
    if train[0].is_floating_point():
        train, val = (train[0].to(dtype), train[1]), (val[0].to(dtype), val[1])
    scores, dots = run_step(model, train, val, loss=loss, label_shift=label_shift)

    def error(got, exact, scale):
        return ((got - exact).abs() / torch.maximum(exact.abs(), 0.1 * scale)).max().item()

    worst = error(scores, total(want), total(scales))
    record("relative_error", worst)
    assert worst <= TOLERANCE
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert set(dots) == trained, "every trainable parameter is scored"
    # A gradient that is zero but for rounding (softmax ignores key biases) has no direction.
    noise = 1e-3 * max(scale.max() for scale in scales.values())
    largest = max(g.norm() for g in want_grad.values())
    for name in trained:
        if name in want:
            assert error(dots[name], want[name], scales[name] + noise) <= TOLERANCE, name
            got = dict(model.named_parameters())[name].grad.double()
            norm = want_grad[name].norm() + 1e-2 * largest
            assert (got - want_grad[name]).norm() <= TOLERANCE * norm, name
        else:
            assert not dots[name].any(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_language_model(name, dtype, record_property):
    train, val = token_batch(4, 11, VOCAB, seed=1, ragged=True), token_batch(2, 11, VOCAB, seed=2)
    if name == "llama-mask":
        train[0][1, :3] = 0  # padded on the left
        train[1][1, :4] = -100
    check(LANGUAGE_MODELS[name](), train, val, dtype, record_property)


class Predicting(nn.Module):
    """Leaves out what is predicted at virtual tokens."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).logits[:, -x.shape[1] :]


@pytest.mark.parametrize("rows", [3, 4, 8])
@pytest.mark.parametrize("name", ["PromptTuningConfig", "PromptEncoderConfig"])
def test_virtual_tokens(name, rows, record_property):
    """They are the same for every row, and repeated; a batch may be as long as they are wide."""
    model = Predicting(adapters(name, num_virtual_tokens=3))
    train = token_batch(rows - 1, 11, VOCAB, seed=1, ragged=True)
    check(model, train, token_batch(1, 11, VOCAB, seed=2), torch.float64, record_property)


@pytest.mark.parametrize("given", [{}, {"label_shift": 0}, {"label_shift": 1}], ids=str)
@pytest.mark.parametrize("name", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_the_first_label_is_predicted_by_virtual_tokens(name, given, close):
    """But not behind a prefix, which is in the cache; and no other count of labels passes."""
    model = adapters(name, num_virtual_tokens=3).double()
    x, y = token_batch(4, 11, VOCAB, seed=1, ragged=True)
    val = token_batch(2, 11, VOCAB, seed=2, ragged=True)
    engine = GradDotProdEngine(model, **given)
    by_name = lambda x, y: {"input_ids": x, "labels": y}
    batch = by_name(x, y)
    shifts = int(name == "PrefixTuningConfig")
    wrong = given.get("label_shift", shifts) != shifts
    refusal = pytest.raises(GraddotError, match="labelled tokens by its labels.* loss used")
    with refusal if wrong else contextlib.nullcontext():  # of validation or of training
        # Of unequal numbers of labels, weighted by them.
        direction = engine.compute_directions(
            [by_name(a[None], b[None]) for a, b in zip(*val, strict=True)]
        )
        engine.set_directions(direction)
        engine.attach()
        engine.attach_train_batch(batch, None, 0, None)
        model(**batch, num_items_in_batch=torch.tensor(20)).loss.backward()  # as Trainer calls it
        engine.prepare_gradients()
    if wrong:
        return
    exact = mapping_gradient(model, by_name(*val))
    rows = [by_name(x[i : i + 1], y[i : i + 1]) for i in range(4)]
    want = [
        sum((d * mapping_gradient(model, row)[n]).sum() for n, d in exact.items()) for row in rows
    ]
    close(engine.aggregate_and_log(), torch.stack(want), TOLERANCE)


def test_fourierft(record_property):
    """In float64 alone: its transform in fp32 is off by about 1e-5, with or without scores."""
    train, val = token_batch(4, 11, VOCAB, seed=1, ragged=True), token_batch(2, 11, VOCAB, seed=2)
    model = adapters("FourierFTConfig", n_frequency=10)
    check(model, train, val, torch.float64, record_property)


def test_spec_augment(record_property, monkeypatch):
    """wav2vec 2 writes a trained vector over frames that numpy draws, and asks for a gradient of its
    input: as the first step's checks see it the masks are the same for all rows, as trained, not."""
    audio = transformers.models.wav2vec2.modeling_wav2vec2
    config = transformers.Wav2Vec2Config(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        conv_dim=[8, 8], conv_stride=[2, 2], conv_kernel=[4, 3], num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, layerdrop=0, num_labels=5,
        classifier_proj_size=8, mask_time_prob=0.3, mask_time_length=3, final_dropout=0,
        hidden_dropout=0, attention_dropout=0, activation_dropout=0, feat_proj_dropout=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = shaken(transformers.Wav2Vec2ForSequenceClassification(config)).train().double()
    draw, masks = audio._compute_mask_indices, []
    monkeypatch.setattr(
        audio,
        "_compute_mask_indices",
        lambda *args, **kw: masks.append(draw(*args, **kw)) or masks[-1],
    )
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(6, 120, generator=g, dtype=torch.float64), torch.arange(6) % 5
    batch = lambda rows: {"input_values": x[rows], "labels": y[rows]}
    engine = GradDotProdEngine(model, batch(slice(4, 6)))
    engine.attach()
    for _ in range(2):  # of which the second checks nothing
        model.zero_grad()
        engine.attach_train_batch(batch(slice(4)), None, 0, None)
        model(**engine.prepare_forward_input(batch(slice(4)))[0]).loss.backward()
        engine.prepare_gradients()
        scores = engine.aggregate_and_log()
    mask = masks[-1]
    assert (mask[0] != mask[1]).any()

    def exact(rows):
        monkeypatch.setattr(audio, "_compute_mask_indices", lambda *args, **kw: mask[rows])
        return mapping_gradient(model, batch(rows))

    engine.detach()
    val, *samples = (exact(rows) for rows in (slice(4, 6), *(slice(i, i + 1) for i in range(4))))
    want = torch.stack([sum((val[n] * own[n]).sum() for n in val) for own in samples])
    error = ((scores - want).abs() / want.abs()).max().item()
    record_property("relative_error", error)
    assert error <= TOLERANCE


def test_xglm(record_property):
    """Its attention makes a number of the default dtype, which float64 does not fit into fp32."""
    model = causal(
        "XGLM", d_model=16, ffn_dim=24, num_layers=2, attention_heads=2, dropout=0,
        attention_dropout=0, activation_dropout=0, layerdrop=0,
    )  # fmt: skip
    train, val = token_batch(4, 11, VOCAB, seed=1, ragged=True), token_batch(2, 11, VOCAB, seed=2)
    torch.set_default_dtype(torch.float64)
    try:
        check(model, train, val, torch.float64, record_property)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_recurrence_of_its_own_is_refused():
    blocks = ["recurrent", "attention"]
    model = causal("RecurrentGemma", lru_width=16, attention_window_size=8, block_types=blocks)
    train, val = token_batch(3, 9, VOCAB, seed=1), token_batch(2, 9, VOCAB, seed=2)
    with pytest.raises(GraddotError, match="rg_lru of type RecurrentGemmaRglru has no rule"):
        run_step(model, train, val)


@pytest.mark.parametrize(
    "name", ["llama", "gemma2", "qwen3", "mixtral", "gpt-oss", "t5", "opt", "bert", "deberta-v3"]
)
def test_bf16(name, record_property):
    """bf16 parameters: scores within 2e-2 of their Cauchy-Schwarz scale."""
    model = LANGUAGE_MODELS[name]()
    train, val = token_batch(5, 31, VOCAB, seed=1, ragged=True), token_batch(2, 31, VOCAB, seed=2)
    dots, scales = sample_dots(model, train, val)
    scores, _ = run_step(copy.deepcopy(model).bfloat16(), train, val)
    error = ((scores - total(dots)).abs() / total(scales)).max().item()
    record_property("relative_error", error)
    assert error <= 2e-2


@pytest.mark.parametrize("name", ["llama", "t5", "mixtral", "gpt-oss", "bert", "lora"])
def test_check_layer_proves_whole_models(name):
    check_layer(LANGUAGE_MODELS[name](), token_batch(3, 7, VOCAB, seed=1)[0])


@pytest.mark.parametrize(
    "name", ["opt", "mixtral", "gpt-oss", "mixtral-lora", "deberta-v3", "bare-parameters"]
)
def test_first_batch_of_one_row(name, record_property):
    """A given direction and one training row, in layers that see tokens without their rows; then
    more rows of the same length, about which the first batch says nothing."""
    if name == "bare-parameters":
        model, loss, shift = OTHER_MODELS[name][0](), F.cross_entropy, 0
        x, y = (
            torch.randn(6, 8, 10, generator=torch.Generator().manual_seed(1)),
            torch.arange(6) % 5,
        )
    else:
        model, loss, shift = LANGUAGE_MODELS[name](), lm_loss, 1
        x, y = token_batch(6, 11, VOCAB, seed=1)
    engine = GradDotProdEngine(model, label_shift=shift)
    engine.attach()
    logits = lambda x: getattr(out := model(x), "logits", out)
    engine.set_directions(
        engine.compute_directions([(x[4:], y[4:])], lambda _, x, y: loss(logits(x), y))
    )
    dots, scales = sample_dots(model, (x[:4], y[:4]), (x[4:], y[4:]), loss=loss)
    errors = []
    for rows in (slice(0, 1), slice(1, 4)):
        engine.attach_train_batch(x[rows], y[rows], 0, None)
        engine.track_loss(loss(logits(x[rows]), y[rows])).backward()
        want, scale = total(dots)[rows], total(scales)[rows]
        error = (engine.aggregate_and_log() - want).abs() / torch.maximum(want.abs(), 0.1 * scale)
        errors.append(error.max().item())
    record_property("relative_error", max(errors))
    assert max(errors) <= TOLERANCE


def test_losses_that_are_no_mean_over_labelled_tokens_are_refused():
    train, val = token_batch(3, 9, VOCAB, seed=1, ragged=True), token_batch(2, 9, VOCAB, seed=2)

    def step(model, **kwargs):
        engine = GradDotProdEngine(model, val)
        engine.attach()
        engine.attach_train_batch(*train, 0, None)
        x, y = engine.prepare_forward_input(*train)
        model(x, labels=y, **kwargs)

    with pytest.raises(GraddotError, match=r"aux_loss \(2.*output_router_logits=False"):
        step(moe("Mixtral", num_local_experts=4, output_router_logits=True))
    model = causal("Llama")
    weight = torch.linspace(0.1, 3, VOCAB)
    model.loss_function = lambda logits, labels, vocab_size, **_: F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), weight
    )
    with pytest.raises(GraddotError, match="those of 2 and the other 3 rows have the mean"):
        step(model)


@pytest.mark.parametrize("rows", [1, 3])
def test_num_items_in_batch_is_seen_to_divide_or_not(rows, close):
    """T5 takes it and ignores it; another loss is divided by it, even under another name."""
    batch = lambda n, seed: dict(
        zip(["input_ids", "labels"], token_batch(n, 9, VOCAB, seed=seed), strict=True)
    )
    train, val, items = batch(rows, 1), batch(2, 2), torch.tensor(40)

    def named_otherwise(logits, labels, vocab_size, num_items_in_batch=None, **_):
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        whole = F.cross_entropy(logits, labels, reduction="sum")
        return whole / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    def ignoring(logits, labels, vocab_size, num_items_in_batch=None, **_):
        return named_otherwise(logits, labels, vocab_size)

    ignoring.__name__ = "ForCausalLMLoss"
    for model, own in [
        (t5(), None),
        (causal("Llama"), named_otherwise),
        (causal("Llama"), ignoring),
    ]:
        if own is not None:
            model.loss_function = own
        dots, scales = mapping_dots(model, train, val)
        engine = GradDotProdEngine(model, label_shift=int(own is not None))
        engine.attach()
        engine.set_directions(engine.compute_directions([val]))
        engine.attach_train_batch(train, None, 0, None)
        model(**train, num_items_in_batch=items).loss.backward()
        engine.prepare_gradients()
        close(engine.aggregate_and_log(), dots, TOLERANCE, scales)

    model = causal("Llama")
    model.loss_function = lambda *args, **kwargs: named_otherwise(*args, **kwargs) + 1
    with pytest.raises(GraddotError, match="num_items_in_batch=40 the model's loss is"):
        engine = GradDotProdEngine(model, val, label_shift=1)
        engine.attach()
        engine.attach_train_batch(train, None, 0, None)
        model(**engine.prepare_forward_input(train)[0], num_items_in_batch=items)


def tiny(name, **settings):
    """A model of transformers whose loss is its own."""
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    sizes = {
        "vocab_size": VOCAB, "hidden_size": 16, "d_model": 16, "n_embd": 16, "n_layer": 2, "n_head": 2,
        "num_hidden_layers": 2, "decoder_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
        "decoder_attention_heads": 2, "decoder_ffn_dim": 24, "max_position_embeddings": 32,
        "dropout": 0.0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        "n_positions": 32, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    }  # fmt: skip
    return shaken(cls(cls.config_class(**sizes, **settings))).double()


@pytest.mark.parametrize(
    "name", ["BartForCausalLM", "BertForMultipleChoice", "ImageGPTForCausalImageModeling"]
)
def test_losses_that_forwards_make_themselves(name, record_property):
    """transformers says ForCausalLMLoss of them all: one that does not shift, one of whole rows, one
    that shifts by itself."""
    model = tiny(name)
    ids, labels = token_batch(6, 11, VOCAB - 1, seed=1, ragged=True)
    if name == "BertForMultipleChoice":
        choices = token_batch(18, 11, VOCAB, seed=1)[0].view(6, 3, 11)
        batch = {"input_ids": choices, "labels": torch.arange(6) % 3}
    else:
        batch = {"input_ids": ids, "labels": labels}
    train, val = ({key: x[rows] for key, x in batch.items()} for rows in (range(4), range(4, 6)))
    want, scale = mapping_dots(model, train, val)
    engine = GradDotProdEngine(model, val)
    engine.attach()
    engine.attach_train_batch(train, None, 0, None)
    model(**engine.prepare_forward_input(train)[0]).loss.backward()
    engine.prepare_gradients()
    error = ((engine.aggregate_and_log() - want).abs() / scale).max().item()
    record_property("relative_error", error)
    assert error <= TOLERANCE


class Classifier(transformers.PreTrainedModel):
    """A model of one's own, of which transformers says ForCausalLMLoss."""

    config_class = transformers.GPT2Config

    def __init__(self, config):
        super().__init__(config)
        self.table, self.head = nn.Embedding(VOCAB, 8), nn.Linear(8, 3)
        self.post_init()

    def forward(self, input_ids, labels):
        logits = self.head(self.table(input_ids).tanh().mean(1))
        return ModelOutput(loss=F.cross_entropy(logits, labels), logits=logits)


def test_one_label_a_row_is_not_shifted(close):
    model = shaken(Classifier(transformers.GPT2Config())).double()
    batch = {"input_ids": token_batch(6, 11, VOCAB, seed=1)[0], "labels": torch.arange(6) % 3}
    train, val = ({key: x[rows] for key, x in batch.items()} for rows in (range(4), range(4, 6)))
    want, scale = mapping_dots(model, train, val)
    engine = GradDotProdEngine(model)
    engine.attach()
    engine.set_directions(engine.compute_directions([val]))
    engine.attach_train_batch(train, None, 0, None)
    model(**train).loss.backward()
    engine.prepare_gradients()
    close(engine.aggregate_and_log(), want, TOLERANCE, scale)


@pytest.mark.parametrize("riding", [True, False], ids=["riding", "given"])
@pytest.mark.parametrize("lengths", [(6,), (9, 6)], ids=["first", "later"])
def test_as_many_target_tokens_as_rows(lengths, riding, record_property):
    """Bart's decoder gives its table of positions the tokens' positions, (T,), beside the tokens."""
    model = tiny(
        "BartForConditionalGeneration", encoder_layers=2, encoder_attention_heads=2,
        encoder_ffn_dim=24, attention_dropout=0.0, activation_dropout=0.0, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    engine = GradDotProdEngine(model)
    for number, length in enumerate(lengths):
        ids, labels = (token_batch(8, n, VOCAB, seed=number)[0] for n in (7, length))
        rows = (range(4), range(4, 6)) if riding else (range(6), range(6, 8))
        train, val = ({"input_ids": ids[part], "labels": labels[part]} for part in rows)
        want, scale = mapping_dots(model, train, val)
        if riding:
            engine = GradDotProdEngine(model, val)
        engine.attach()
        if not riding:
            engine.set_directions(mapping_gradient(model, val))
        engine.attach_train_batch(train, None, number, None)
        model(**engine.prepare_forward_input(train)[0]).loss.backward()
        engine.prepare_gradients()
        error = ((engine.aggregate_and_log() - want).abs() / scale).max().item()
        record_property("relative_error", error)
        assert error <= TOLERANCE
        engine.detach()


class ByIndex(nn.Module):
    """Of a layer that has whole numbers beside its input, (rows,), which it mixes."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x, index):
        return x * self.weight * (1 + index.sum())


class WithIndex(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.by_index = nn.Linear(5, 4), ByIndex()

    def forward(self, x):
        return self.by_index(self.body(x), (x[:, 0] > 0).long())


def test_whole_numbers_of_the_rows_that_are_mixed_are_refused():
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    batches = (x[:4], torch.arange(4)), (x[4:], torch.arange(2))
    with pytest.raises(GraddotError, match="depends on other samples of the batch of 6 rows"):
        run_step(WithIndex(), *batches, loss=F.cross_entropy, label_shift=0)


def test_given_directions_of_weights_that_the_forward_casts(record_property):
    """A router in fp32, whatever the model's dtype."""
    model = deepseek_v3().double()
    train, val = token_batch(4, 11, VOCAB, seed=1), token_batch(2, 11, VOCAB, seed=2)
    dots, scales = sample_dots(model, train, val)
    engine = GradDotProdEngine(model)
    engine.attach()
    engine.set_directions(gradient(model, *val))
    engine.attach_train_batch(*train, 0, None)
    model(train[0], labels=train[1]).loss.backward()
    engine.prepare_gradients()
    error = ((engine.aggregate_and_log() - total(dots)).abs() / total(scales)).max().item()
    record_property("relative_error", error)
    assert error <= TOLERANCE


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
def test_experts_in_their_default_implementation(kind, record_property):
    """transformers groups the experts' products (fp32 and bf16 only); the scores are the same."""
    train, val = token_batch(4, 11, VOCAB, seed=1), token_batch(2, 11, VOCAB, seed=2)
    eager, grouped = (
        moe(kind, num_local_experts=4, experts_implementation=name)
        for name in ("eager", "grouped_mm")
    )
    dots, scales = sample_dots(eager, train, val)
    scores, _ = run_step(grouped, train, val)
    error = ((scores - total(dots)).abs() / torch.maximum(scores.abs(), 0.1 * total(scales))).max()
    record_property("relative_error", error.item())
    assert error <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", OTHER_MODELS)
def test_other_model(name, dtype, record_property):
    build, shape = OTHER_MODELS[name]
    g = torch.Generator().manual_seed(5)
    x, y = torch.randn(6, *shape, generator=g), torch.randint(0, 5, (6,), generator=g)
    train, val = (x[:4], y[:4]), (x[4:], y[4:])
    loss = F.cross_entropy
    check(build(), train, val, dtype, record_property, loss=loss, label_shift=0)


@pytest.mark.parametrize(
    ("last", "why"),
    [
        (Scale(8), "its rule needs the rows as the first dimension"),
        (nn.GRU(8, 8, batch_first=True), "head gets an input .* that depends on other samples"),
        (nn.Softmax(1), "head gets an input .* that depends on other samples"),
    ],
    ids=["own parameters", "recurrent", "mixing"],
)
def test_rows_in_one_sequence_that_is_more_than_its_tokens(last, why):
    first = lambda x: x[0] if isinstance(x, tuple) else x
    model = OneSequence(lambda x: first(last(x)))
    model.part = last
    x, y = torch.randn(6, 7, 10), torch.arange(6) % 5
    with pytest.raises(GraddotError, match=why):
        run_step(model, (x[:4], y[:4]), (x[4:], y[4:]), loss=F.cross_entropy, label_shift=0)


def test_rows_and_tokens_of_one_number():
    """As many rows as tokens: shapes alone do not tell positions (T,) from rows."""
    x, y = torch.randn(9, 8, 10), torch.arange(9) % 5
    check(
        Tokens(), (x[:7], y[:7]), (x[7:], y[7:]), torch.float64, lambda *_: None,
        loss=F.cross_entropy, label_shift=0,
    )  # fmt: skip


def test_attention_mask_beside_the_joint_batch():
    """Further inputs go along the joint batch: training rows, then validation rows."""
    model = causal("Llama")
    train, val = token_batch(4, 11, VOCAB, seed=1), token_batch(2, 11, VOCAB, seed=2)
    for rows in (train, val):
        rows[0][0, :3] = 0
        rows[1][0, :4] = -100
    want = total(sample_dots(WithMask(model), train, val)[0])
    engine = GradDotProdEngine(model, val)
    engine.attach()
    engine.attach_train_batch(*train, 0, None)
    x, y = engine.prepare_forward_input(*train)
    model(
        x, attention_mask=torch.cat([train[0] != 0, val[0] != 0]).long(), labels=y
    ).loss.backward()
    engine.prepare_gradients()
    assert ((engine.aggregate_and_log() - want).abs() <= TOLERANCE * want.abs()).all()
