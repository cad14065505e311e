"""What scored linear layers keep for their backward, and that it gives the same bits."""

import pytest
import torch
from brute_force import tiny_gpt2, token_batch
from graddot_lm import GradDotProdEngine
from graddot_lm.rules.recompute import made_of, remember
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def gpt2_with(activation):
    model = tiny_gpt2(tied=True)
    for block in model.transformer.h:
        block.mlp.act = activation
    return model


MODELS = {
    "gelu": lambda: gpt2_with(nn.GELU(approximate="tanh")),
    "silu": lambda: gpt2_with(nn.SiLU()),
    "llama": tiny_llama,
}


def step(model):
    """Scores, gradients, and by layer the linear layers' inputs and what their nodes keep."""
    inputs, kept = {}, {}
    (train, val) = (token_batch(n, 9, 31, seed=n)[0] for n in (3, 2))
    engine = GradDotProdEngine(model, (val, val))
    engine.attach()

    def look(name):
        def hook(module, args, out):
            if not out.requires_grad or len(out) < 5:  # in the engine's checks
                return
            inputs[name] = args[0].detach().clone(), args[0].data_ptr()
            node = out.grad_fn
            while not node.name().startswith("LinearDot"):
                node = node.next_functions[0][0]
            kept[name] = node

        return hook

    hooks = [
        module.register_forward_hook(look(name))
        for name, module in model.named_modules()
        if name.endswith(("c_attn", "c_fc", "mlp.c_proj", "q_proj", "v_proj", "down_proj"))
    ]
    engine.attach_train_batch(train, train, 0, None)
    ids, labels = engine.prepare_forward_input(train, train)
    loss = model(input_ids=ids, labels=labels).loss
    addresses = {
        name: [t.data_ptr() for t in node.saved_tensors if t is not None]
        for name, node in kept.items()
    }
    loss.backward()
    engine.prepare_gradients()
    scores = engine.aggregate_and_log()
    engine.detach()
    for hook in hooks:
        hook.remove()
    grads = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return scores, grads, inputs, addresses


@pytest.mark.parametrize("kind", MODELS)
def test_inputs_are_not_kept_and_bits_are_the_same(kind, monkeypatch):
    monkeypatch.setattr("graddot_lm.rules.recompute._MIN_OUTPUTS", 0)
    model = MODELS[kind]().train()
    scores, grads, inputs, addresses = step(model)
    assert len(inputs) == 6
    for name, (_, address) in inputs.items():
        assert address not in addresses[name], name
    monkeypatch.setattr("graddot_lm.rules.recompute._of_node", lambda node: None)
    monkeypatch.setattr("graddot_lm.scored.remember", lambda out, *_: out)
    monkeypatch.setattr("graddot_lm.rules.norms.remember", lambda out, *_: out)
    want, want_grads, inputs, addresses = step(model)
    for name, (_, address) in inputs.items():
        assert address in addresses[name], name
    assert torch.equal(scores, want)
    for name, grad in grads.items():
        assert torch.equal(grad, want_grads[name]), name


def test_what_is_shared_is_made_once():
    x = torch.randn(3, requires_grad=True)
    made = []

    def make(x):
        made.append(2 * x)
        return made[-1]

    out = remember(x * 2, make, x)
    first, second = made_of(out, 768), made_of(out, 768)
    assert first[0](*first[1]) is second[0](*second[1])
    assert len(made) == 1
    assert torch.equal(first[0](*first[1]), made[0])  # a second backward makes it again
    assert len(made) == 2


def test_what_is_kept_as_it_is():
    x = torch.randn(3, requires_grad=True)
    weight = torch.randn(3)

    def is_kept(y, outputs=768):
        _, sources = made_of(y, outputs)
        return len(sources) == 1 and sources[0].data_ptr() == y.data_ptr()

    gelu = torch.nn.functional.gelu
    assert not is_kept(gelu(x))
    assert is_kept(gelu(x), outputs=128)
    assert is_kept(x)
    assert is_kept(x * weight)  # x itself is not kept by the product
    with torch.no_grad():
        changed = gelu(torch.randn(3, requires_grad=True))
    assert is_kept(changed)
    changed = gelu(x)
    with torch.no_grad():
        changed.add_(1)
    assert is_kept(changed)
    with torch.autograd.graph.save_on_cpu():
        assert is_kept(gelu(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert is_kept(remember(x + 1, lambda x: x + 1, x))
