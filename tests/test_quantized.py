"""Adapters on a quantized base, as QLoRA trains them: the base's weights are no floating-point numbers."""

import warnings

import pytest
import torch
from brute_force import norm, token_batch
from engine_steps import relative
from graddot_lm import GradDotProdEngine
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    bnb = pytest.importorskip("bitsandbytes")


def nf4(linear):
    quantized = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, quant_type="nf4"
    )
    quantized.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    return quantized.to("cpu")  # where it is quantized


def int8(linear):
    quantized = bnb.nn.Linear8bitLt(
        linear.in_features, linear.out_features, bias=False, has_fp16_weights=False
    )
    quantized.weight = bnb.nn.Int8Params(
        linear.weight.data, requires_grad=False, has_fp16_weights=False
    )
    return quantized.to("cpu")


def base(quantize):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for part in list(model.model.modules()):
        for name, child in list(part.named_children()):
            if isinstance(child, nn.Linear):
                setattr(part, name, quantize(child))
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = quantize is nf4, quantize is int8
    return model


def adapted(model, **options):
    config = LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM",
        **options,
    )  # fmt: skip
    return get_peft_model(model, config)


MODELS = {
    "nf4": lambda: adapted(base(nf4)),
    "nf4, prepared": lambda: adapted(prepare_model_for_kbit_training(base(nf4))),
    "nf4, dora": lambda: adapted(base(nf4), use_dora=True),
    "int8": lambda: adapted(base(int8)),
}


def gradient(model, x):
    """In the model's own dtypes, for in others it would be another model."""
    model.zero_grad()
    model(input_ids=x, labels=x).loss.backward()
    named = model.named_parameters()
    return {n: p.grad.double() for n, p in named if p.grad is not None}


@pytest.mark.parametrize("given", [False, True], ids=["riding", "given"])
@pytest.mark.parametrize("name", MODELS)
def test_scores_and_gradients(name, given, close):
    model = MODELS[name]().train()
    (x, _), (val, _) = token_batch(4, 12, seed=1), token_batch(2, 12, seed=2)
    direction, want_grad = gradient(model, val), gradient(model, x)
    own = [gradient(model, row[None]) for row in x]
    want = torch.stack([sum((direction[n] * g[n]).sum() for n in g) for g in own])
    scales = norm(direction) * torch.stack([norm(g) for g in own])
    engine = GradDotProdEngine(model, None if given else (val, val))
    if given:
        engine.set_directions(engine.compute_directions([(val, val)]))
    assert engine.coverage().share == 1
    engine.attach()
    for step in range(2):
        model.zero_grad()
        engine.attach_train_batch(x, x, step, None)
        inputs, labels = engine.prepare_forward_input(x, x)
        model(input_ids=inputs, labels=labels).loss.backward()
        engine.prepare_gradients()
        close(engine.aggregate_and_log(), want, 1e-5, scales)
    for n, p in model.named_parameters():
        if p.requires_grad:
            assert relative(p.grad, want_grad[n]) <= 1e-5, n
