"""Loops as people write them: batches, evaluation, attaching and detaching, accelerate.

All against the float64 brute force, one backward a sample. Losses of transformers models are
computed in fp32 whatever the model's dtype, which bounds the tests that use them to 1e-5.
"""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from brute_force import gradient, lm_loss, sample_dots, tiny_gpt2, token_batch, total
from graddot_lm import GraddotError, GradDotProdEngine
from loop_steps import (
    Store,
    attached,
    mapping_dots,
    mapping_gradient,
    padded,
    run,
    same_gradients,
)
from model_zoo import VOCAB, moe
from net_steps import TRAIN, VAL, Net
from torch import nn

# Batches


def run_mapping(engine, train, labels_inside):
    x, y = dict(train), None
    if not labels_inside:
        y = x.pop("labels")
    engine.attach_train_batch(x, y, 0, None)
    inputs, labels = engine.prepare_forward_input(x, y)
    kwargs = inputs if labels_inside else {**inputs, "labels": labels}
    engine.model(**kwargs).loss.backward()
    engine.prepare_gradients()
    return engine.aggregate_and_log()


@pytest.mark.parametrize("labels_inside", [True, False], ids=["inside", "beside"])
def test_mappings_of_any_size_and_length(close, labels_inside):
    model = tiny_gpt2().double()
    val = padded(2, [9, 6], seed=2)
    fill = {"input_ids": 60, "attention_mask": 0}
    given = (
        val if labels_inside else ({k: v for k, v in val.items() if k != "labels"}, val["labels"])
    )
    engine = GradDotProdEngine(model, given, padding=fill)
    engine.attach()
    for seed, lengths in enumerate([[9, 5, 9], [4, 3], [15, 11, 7, 2], [9]]):
        train = padded(len(lengths), lengths, seed=seed)
        want, scale = mapping_dots(model, train, val)
        model.zero_grad()
        close(run_mapping(engine, train, labels_inside), want, 1e-5, scale)
        same_gradients(model, mapping_gradient(model, train), 1e-5)


def test_rows_of_another_length_are_refused_with_the_key_to_fill():
    engine = attached(tiny_gpt2(), token_batch(1, 6, seed=2))
    with pytest.raises(GraddotError, match="padding={key: value} for every key .*'inputs' for a t"):
        engine.attach_train_batch(*token_batch(2, 9, seed=1), 0, None)


def test_tensors_of_another_length_are_filled_up(close):
    model = tiny_gpt2().double()
    train, val = token_batch(3, 15, seed=1), token_batch(2, 9, seed=2)
    dots, scales = sample_dots(model, train, val)
    engine = attached(model, val, padding={"inputs": 0})
    run(engine, train)
    close(engine.aggregate_and_log(), total(dots), 1e-10, total(scales))


def test_batches_that_cannot_be_joined_are_refused():
    model, val = tiny_gpt2(), padded(2, [9, 6], seed=2)
    with pytest.raises(GraddotError, match="no labels"):
        GradDotProdEngine(model, {"a": {"input_ids": val["input_ids"]}})
    engine = GradDotProdEngine(model, val)
    engine.attach()
    train = padded(2, [5, 5], seed=1)
    with pytest.raises(GraddotError, match=r"of labels have shape \(5,\).*padding="):
        engine.attach_train_batch(train, None, 0, None)
    with pytest.raises(GraddotError, match="3 attention_mask and 2 labels"):
        mask = torch.ones(3, 5)
        engine.attach_train_batch({**train, "attention_mask": mask}, None, 0, None)
    engine.detach()
    engine = GradDotProdEngine(model, val, padding={"input_ids": 0})
    engine.attach()
    engine.attach_train_batch(train, None, 0, None)
    with pytest.raises(GraddotError, match=r"rows of attention_mask have shape \(5,\)"):
        engine.prepare_forward_input(train)
    with pytest.raises(GraddotError, match="training rows are a tensor, validation rows a mapping"):
        engine.prepare_forward_input(train["input_ids"], train["labels"])


def test_padding_without_a_mask_is_refused():
    model = tiny_gpt2()
    train, val = padded(2, [5, 5], seed=1), padded(2, [9, 6], seed=2)
    del train["attention_mask"], val["attention_mask"]
    engine = GradDotProdEngine(model, val, padding={"input_ids": 0})
    engine.attach()
    engine.attach_train_batch(train, None, 0, None)
    with pytest.raises(GraddotError, match="need an attention_mask"):
        engine.prepare_forward_input(train)


# Evaluation, attaching and detaching


def test_evaluation_in_the_midst_of_a_step(close):
    model = tiny_gpt2().double()
    train, val = token_batch(4, 15, seed=1), token_batch(2, 15, seed=2)
    dots, scales = sample_dots(model, train, val)
    other = token_batch(3, 20, seed=5)[0]
    want = copy.deepcopy(model)(other).logits
    engine = attached(model, val)

    def evaluate():
        model.eval()
        with torch.no_grad():
            assert torch.equal(model(other).logits, want)
            model.transformer(other)
            with pytest.raises(IndexError):
                model(other + 100)
        model.train()

    evaluate()
    engine.attach_train_batch(*train, 0, None)
    evaluate()
    x, y = engine.prepare_forward_input(*train)
    loss = engine.track_loss(lm_loss(model(x).logits, y))
    evaluate()
    loss.backward()
    evaluate()
    engine.prepare_gradients()
    evaluate()
    close(engine.aggregate_and_log(), total(dots), 1e-10, total(scales))
    same_gradients(model, gradient(model, *train), 1e-10)


def test_a_forward_that_failed_is_tried_again(close):
    model = tiny_gpt2().double()
    train, val = token_batch(4, 15, seed=1), token_batch(2, 15, seed=2)
    dots, scales = sample_dots(model, train, val)
    engine = attached(model, val)
    engine.attach_train_batch(*train, 0, None)
    x, y = engine.prepare_forward_input(*train)
    fail = model.transformer.ln_f.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(x)
    fail.remove()
    engine.track_loss(lm_loss(model(x).logits, y)).backward()
    engine.prepare_gradients()
    close(engine.aggregate_and_log(), total(dots), 1e-10, total(scales))


def test_detached_and_attached_again_in_a_run(close):
    model = tiny_gpt2().double()
    train, val = token_batch(4, 15, seed=1), token_batch(2, 15, seed=2)
    dots, scales = sample_dots(model, train, val)
    want_grad = gradient(model, *train)
    engine = attached(model, val)
    run(engine, train)
    first = engine.aggregate_and_log()
    engine.attach_train_batch(*train, 1, None)
    x, y = engine.prepare_forward_input(*train)
    loss = lm_loss(model(x).logits, y)
    engine.detach()  # in the midst: no scores, but the training gradient
    model.zero_grad()
    loss.backward()
    same_gradients(model, want_grad, 1e-10)
    model.zero_grad()
    lm_loss(model(train[0]).logits, train[1]).backward()
    same_gradients(model, want_grad, 1e-10)
    engine.attach()
    model.zero_grad()
    run(engine, train)
    same_gradients(model, want_grad, 1e-10)
    close(engine.aggregate_and_log(), first, 1e-12)
    close(first, total(dots), 1e-10, total(scales))


# accelerate


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
@pytest.mark.parametrize("engine_first", [False, True], ids=["prepared first", "engine first"])
def test_a_loop_of_accelerate(close, mixed_precision, engine_first):
    """Two micro-batches a step, clipped: scores, values and the weights of a loop without us."""
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(
        cpu=True, mixed_precision=mixed_precision, gradient_accumulation_steps=2
    )
    model, store = tiny_gpt2(), Store()
    plain, optimizer = copy.deepcopy(model), torch.optim.SGD(model.parameters(), lr=0.5)
    ids, labels = token_batch(6, 15, seed=1, ragged=True)
    loader = torch.utils.data.DataLoader(
        [{"input_ids": x, "labels": y} for x, y in zip(ids, labels, strict=True)], batch_size=3
    )
    val = dict(zip(("input_ids", "labels"), token_batch(2, 15, seed=2), strict=True))
    make = lambda model: GradDotProdEngine(model, val, store=store)
    if engine_first:
        engine = make(model)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    else:
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        engine = make(model)
    engine.attach(optimizer)
    want, clip = [], 1.0
    for number, batch in enumerate(loader):
        with accelerator.accumulate(model):
            dots, scales = mapping_dots(plain, {**batch, "attention_mask": torch.ones(3, 15)}, val)
            want.append((dots, scales))
            engine.attach_train_batch(batch, None, number, torch.arange(3) + 3 * number)
            joint, _ = engine.prepare_forward_input(batch)
            accelerator.backward(model(**joint).loss)
            engine.prepare_gradients()
            if accelerator.sync_gradients:
                clip = min(1.0, 0.5 / float(accelerator.clip_grad_norm_(model.parameters(), 0.5)))
            optimizer.step()
            optimizer.zero_grad()
    scores = engine.aggregate_and_log(gradient_scale=clip)
    tolerance = 1e-5 if mixed_precision == "no" else 3e-2
    close(scores, torch.cat([dots for dots, _ in want]), tolerance,
          torch.cat([scales for _, scales in want]))  # fmt: skip
    assert clip < 1 and store.column("applied").all()

    for x, y in zip(ids.split(3), labels.split(3), strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision == "bf16"):
            loss = plain(input_ids=x, labels=y).loss / 2
        loss.backward()
    nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
    torch.optim.SGD(plain.parameters(), lr=0.5).step()
    trained = accelerator.unwrap_model(model)
    for name, p in plain.named_parameters():
        assert (trained.get_parameter(name) - p).norm() <= tolerance * p.norm(), name


@pytest.mark.parametrize("kind", ["ride", "given", "packed", "several"])
def test_another_default_device(close, kind):
    """As set by torch.set_default_device; nothing of ours is made there, where nothing could be read."""
    model = moe("Mixtral", num_local_experts=4).double()  # with RMS norms and experts
    train, val = token_batch(3, 15, VOCAB, seed=1), token_batch(2, 15, VOCAB, seed=2)
    dots, scales = sample_dots(model, train, val)
    x, y, kwargs, store = *train, {}, Store()
    if kind == "packed":
        x, y = x.reshape(1, -1), y.clone()
        y[:, 0] = -100
        y, kwargs = y.reshape(1, -1), {"segments": [15] * 3}
    positions = torch.arange(15).repeat(3)[None] if kind == "packed" else None
    if kind == "several":
        kwargs = {"samples": [0, 1, 2]}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with torch.device("meta"):
        engine = attached(model, val if kind == "ride" else None, optimizer, store=store)
        if kind != "ride":
            engine.set_directions(engine.compute_directions([val]))
        for step in range(2):
            engine.attach_train_batch(x, y, step, [4, 5, 6], **kwargs)
            joint, labels = engine.prepare_forward_input(x, y)
            logits = model(joint, position_ids=positions, use_cache=False).logits
            engine.track_loss(lm_loss(logits, labels)).backward()
            engine.prepare_gradients()
            optimizer.step()
            scores = engine.aggregate_and_log()
            optimizer.zero_grad()
        engine.detach()
    close(scores, total(dots), 1e-5, total(scales))
    assert store.column("sample_id").tolist() == [4, 5, 6, 4, 5, 6]


class OfItsOwnPrecision(nn.Module):
    """Runs a model as Lightning Fabric's wrapper does for mixed precision: on inputs of 16 bits, which do
    without its autocast not fit the weights, and returns fp32."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.module(x.bfloat16()).float()


def test_an_autocast_inside_of_the_model(close):
    net = Net()
    net.up = nn.Sequential(net.up, nn.LayerNorm(8))  # scored, it returns fp32
    model = OfItsOwnPrecision(net.float())
    data = [(x.float(), y) for x, y in (TRAIN, VAL)]
    dots, scales = sample_dots(model.module, *data, loss=F.cross_entropy)
    engine = attached(model, data[1], label_shift=0)
    run(engine, data[0], loss=F.cross_entropy)
    close(engine.aggregate_and_log(), total(dots), 3e-2, total(scales))


def test_autocast_leaves_float64_alone(close):
    model = Net()
    dots, scales = sample_dots(model, TRAIN, VAL, loss=F.cross_entropy)
    want = gradient(model, *TRAIN, loss=F.cross_entropy)
    engine = attached(model, VAL, label_shift=0)
    with torch.autocast("cpu", torch.bfloat16):
        run(engine, TRAIN, loss=F.cross_entropy)
    same_gradients(model, want, 1e-10)
    close(engine.aggregate_and_log(), total(dots), 1e-10, total(scales))


def test_a_pickled_attached_model_is_a_plain_model():
    model, val, train = tiny_gpt2(), token_batch(1, 9, seed=2), token_batch(2, 9, seed=1)
    engine = attached(model, val)
    run(engine, train)
    want = engine.aggregate_and_log()
    for kept in (model, copy.deepcopy(model), model.transformer):
        torch.save(kept, io.BytesIO())
        assert b"graddot" not in pickle.dumps(kept)
    loaded = pickle.loads(pickle.dumps(model))
    hooks = lambda m: [h for name, h in m.__dict__.items() if name.startswith("_forward") and h]
    assert not any(map(hooks, loaded.modules())) and any(map(hooks, model.modules()))
    with torch.no_grad():
        assert torch.equal(loaded(val[0]).logits, model(val[0]).logits)
        loaded.lm_head.weight.zero_()
        assert not loaded(val[0]).logits.any() and model.lm_head.weight.any()
    run(engine, train)  # as if nothing had been
    torch.testing.assert_close(engine.aggregate_and_log(), want)
