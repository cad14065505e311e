"""Models as they come: random weights, two layers, dots and gradients against brute force.

Each case is compared with one float64 backward a sample, in fp32 and in float64. The bound is one
for both: most of these models compute norms, rotary angles and softmax in fp32 whatever they hold.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from brute_force import gradient, lm_loss, sample_dots, token_batch, total
from graddot_lm import GradDotProdEngine, check_layer
from test_engine import run_step
from torch import nn

VOCAB = 61
TOLERANCE = 1e-5  # as in test_engine.py, with the denominator explained there


def shaken(model: nn.Module) -> nn.Module:
    """Away from biases of 0 and norm weights of 1, where mistakes can cancel."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model.train()


def causal(kind: str, **settings) -> nn.Module:
    torch.manual_seed(0)
    names = {
        "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 32,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**{**names, **settings})
    return shaken(getattr(transformers, f"{kind}ForCausalLM")(config))


class WithMask(nn.Module):
    """Passes the padding mask of its ids on."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids, attention_mask=(ids != 0).long())


class Shifted(nn.Module):
    """An encoder-decoder whose decoder reads the same ids."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids, decoder_input_ids=ids)


def opt():
    return causal("OPT", ffn_dim=24, word_embed_proj_dim=12, dropout=0.0)


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, hidden_dropout_prob=0, attention_probs_dropout_prob=0,
        max_position_embeddings=32,
    )  # fmt: skip
    return WithMask(shaken(transformers.BertForMaskedLM(config)))


def t5(**settings):
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0,
        relative_attention_num_buckets=8, decoder_start_token_id=0, **settings,
    )  # fmt: skip
    return Shifted(shaken(transformers.T5ForConditionalGeneration(config)))


def lora():
    peft = pytest.importorskip("peft")

    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    return shaken(peft.get_peft_model(causal("Llama"), config))


def gpt_neo():
    return causal(
        "GPTNeo", num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]],
        window_size=4, attention_dropout=0, embed_dropout=0, resid_dropout=0,
    )  # fmt: skip


def gemma3():
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=32,
    )  # fmt: skip
    return shaken(transformers.Gemma3ForCausalLM(config))


def moe(kind, **settings):
    settings = {"num_experts_per_tok": 2, "experts_implementation": "eager", **settings}
    return causal(kind, **settings)


LANGUAGE_MODELS = {
    "llama": lambda: causal("Llama"),
    "llama-tied": lambda: causal("Llama", tie_word_embeddings=True),
    "llama-mask": lambda: WithMask(causal("Llama")),
    "qwen2": lambda: causal("Qwen2"),
    "qwen3": lambda: causal("Qwen3"),
    "mistral": lambda: causal("Mistral", sliding_window=8),
    "gemma": lambda: causal("Gemma"),
    "gemma2": lambda: causal("Gemma2"),
    "gemma3": gemma3,
    "mamba": lambda: causal("Mamba", state_size=4),
    "bloom": lambda: causal("Bloom", n_head=2, n_layer=2, hidden_dropout=0, attention_dropout=0),
    "gpt-neox": lambda: causal("GPTNeoX"),
    "gpt-neo": gpt_neo,
    "opt": opt,
    "phi": lambda: causal("Phi"),
    "phi3": lambda: causal("Phi3"),
    "bert": bert,
    "t5": t5,
    "lora": lora,
    "t5-untied": lambda: t5(tie_word_embeddings=False, feed_forward_proj="gated-gelu"),
    "mixtral": lambda: moe("Mixtral", num_local_experts=4),
    "qwen2-moe": lambda: moe(
        "Qwen2Moe", num_experts=4, moe_intermediate_size=12, shared_expert_intermediate_size=12
    ),
    "qwen3-moe": lambda: moe("Qwen3Moe", num_experts=4, moe_intermediate_size=12),
}


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


@pytest.mark.parametrize("name", ["llama", "gemma", "mixtral", "t5", "opt"])
def test_activation_checkpointing(name, record_property):
    model = LANGUAGE_MODELS[name]()
    inner = model.model if name == "t5" else model
    inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    train, val = token_batch(4, 11, VOCAB, seed=1, ragged=True), token_batch(2, 11, VOCAB, seed=2)
    check(model, train, val, torch.float64, record_property)


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3", "mixtral", "t5", "opt", "bert"])
def test_bf16(name, record_property):
    """bf16 parameters and autocast: scores within 2e-2 of their Cauchy-Schwarz scale."""
    model = LANGUAGE_MODELS[name]()
    train, val = token_batch(5, 31, VOCAB, seed=1, ragged=True), token_batch(2, 31, VOCAB, seed=2)
    dots, scales = sample_dots(model, train, val)
    want, scale = total(dots), total(scales)
    errors = []
    for dtype, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            scores, _ = run_step(copy.deepcopy(model).to(dtype), train, val)
        errors.append(((scores - want).abs() / scale).max().item())
    record_property("relative_error", max(errors))
    assert max(errors) <= 2e-2


@pytest.mark.parametrize("name", ["llama", "t5", "mixtral", "bert", "lora"])
def test_check_layer_proves_whole_models(name):
    check_layer(LANGUAGE_MODELS[name](), token_batch(3, 7, VOCAB, seed=1)[0])


def test_experts_in_their_default_implementation(record_property):
    """transformers groups the experts' products (fp32 and bf16 only); the scores are the same."""
    train, val = token_batch(4, 11, VOCAB, seed=1), token_batch(2, 11, VOCAB, seed=2)
    eager, grouped = (
        moe("Mixtral", num_local_experts=4, experts_implementation=name)
        for name in ("eager", "grouped_mm")
    )
    dots, scales = sample_dots(eager, train, val)
    scores, _ = run_step(grouped, train, val)
    error = ((scores - total(dots)).abs() / torch.maximum(scores.abs(), 0.1 * total(scales))).max()
    record_property("relative_error", error.item())
    assert error <= TOLERANCE


class Convolutions2d(nn.Module):
    """Strides, dilation, "same", circular and grouped convolutions, norms in between."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.PReLU(8),
            nn.Conv2d(8, 8, (3, 2), stride=(2, 1), dilation=(1, 2), bias=False), nn.GELU(),
            nn.Conv2d(8, 6, 4, padding="same"), nn.Tanh(),
            nn.Conv2d(6, 6, 3, padding=1, padding_mode="circular", groups=3),
            nn.BatchNorm2d(6).eval(), nn.ConvTranspose2d(6, 4, 2),
        )  # fmt: skip
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.net(x).mean((2, 3)))


class Convolutions1d(nn.Module):
    """A causal convolution called twice, and RMS norms of torch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.twice = nn.Conv1d(6, 8, 5, padding=2), nn.Conv1d(8, 8, 3, dilation=2)
        self.norm, self.head = nn.RMSNorm(8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.norm(torch.tanh(self.first(x)).transpose(1, 2)).transpose(1, 2)
        for _ in range(2):
            x = x + torch.tanh(self.twice(F.pad(x, (4, 0))))
        return self.head(self.norm(x.mean(2)))


class Scale(nn.Module):
    """No rule and no child: a factor that trains."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(10))

    def forward(self, x):
        return x * self.scale


class Tokens(nn.Module):
    """A class token and positions as bare parameters, a layer shared, nanoGPT's positions (T,)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.cls, self.table = nn.Parameter(torch.randn(1, 1, 10)), nn.Embedding(9, 10)
        self.bias = nn.Parameter(torch.randn(1, 9, 10))
        self.mix, self.scale, self.head = nn.Linear(10, 10), Scale(), nn.Linear(10, 5)
        self.frozen, self.flat = nn.Linear(10, 10).requires_grad_(False), nn.Linear(10, 10)

    def forward(self, x):
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.bias
        x = x + self.table(torch.arange(9))
        x = self.scale(self.mix(torch.tanh(self.scale(self.mix(x)))))
        flat = self.flat(x.reshape(-1, 10))  # samples one after the other
        return self.head(self.frozen(flat.view(x.shape)).mean(1))


def vit():
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        image_size=8, patch_size=4, num_labels=5, hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


OTHER_MODELS = {
    "vit": (vit, (3, 8, 8)),
    "conv2d": (Convolutions2d, (3, 9, 9)),
    "conv1d": (Convolutions1d, (6, 12)),
    "bare-parameters": (Tokens, (8, 10)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", OTHER_MODELS)
def test_other_model(name, dtype, record_property):
    build, shape = OTHER_MODELS[name]
    g = torch.Generator().manual_seed(5)
    x, y = torch.randn(6, *shape, generator=g), torch.randint(0, 5, (6,), generator=g)
    model = build()
    modes = [m.training for m in model.modules()]
    model = shaken(model)
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    train, val = (x[:4], y[:4]), (x[4:], y[4:])
    loss = F.cross_entropy
    check(model, train, val, dtype, record_property, loss=loss, label_shift=0)


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
