"""Models as they come: tiny, with random weights, two layers each."""

import functools
import os
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import transformers
from brute_force import tiny_gpt2
from engine_steps import SharedEverything
from torch import nn
from torch.utils.checkpoint import checkpoint

VOCAB = 61


def shaken(model: nn.Module) -> nn.Module:
    """Away from biases of 0 and norm weights of 1, where mistakes can cancel."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def causal(kind: str, head: str = "ForCausalLM", **settings) -> nn.Module:
    torch.manual_seed(0)
    names = {
        "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 32,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**{**names, **settings})
    return shaken(getattr(transformers, f"{kind}{head}")(config))


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
    return shaken(transformers.BertForMaskedLM(config))


def deberta(kind="DebertaV2", **settings):
    """Positions that every layer's attention projects, without rows, by layers of its own or those
    that its tokens go through."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, hidden_dropout_prob=0, attention_probs_dropout_prob=0,
        max_position_embeddings=32, type_vocab_size=0, relative_attention=True,
        pos_att_type=["c2p", "p2c"], position_biased_input=False, num_labels=VOCAB, **settings,
    )  # fmt: skip
    return shaken(getattr(transformers, f"{kind}ForTokenClassification")(config))


def t5(**settings):
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0,
        relative_attention_num_buckets=8, decoder_start_token_id=0, **settings,
    )  # fmt: skip
    return shaken(transformers.T5ForConditionalGeneration(config))


def adapters(config="LoraConfig", model="Llama", **settings):
    """A frozen model, or what it is called, with adapters of peft, all of them trained."""
    peft = pytest.importorskip("peft")
    if "num_virtual_tokens" not in settings:
        settings.setdefault("target_modules", ["q_proj", "v_proj", "down_proj"])
    config = getattr(peft, config)(**{"task_type": "CAUSAL_LM", **settings})
    with mock.patch.dict(os.environ):  # where BOFT leaves another compiler behind
        model = causal(model) if isinstance(model, str) else model
        return shaken(peft.get_peft_model(model, config))


def lora():
    return adapters(r=4)


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


def needs_mixtures(kind=""):
    listed = (
        "Mixtral",
        "Qwen2Moe",
        "Qwen3Moe",
        "Qwen3Next",
        "Jamba",
    )  # experts that are layers there
    if int(transformers.__version__.split(".")[0]) < 5 and kind not in listed:
        pytest.skip("refused by name with transformers 4, or not to be run in float64 there")


def moe(kind, **settings):
    needs_mixtures(kind)
    settings = {"num_experts_per_tok": 2, "experts_implementation": "eager", **settings}
    return causal(kind, **settings)


def lora_of_experts(kind="Mixtral", **settings):
    """As mixtures are tuned: the experts' weights are one parameter, and no layer to put LoRA around."""
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = moe(kind, num_local_experts=4, **settings)
    return adapters(r=2, model=model, target_modules=["q_proj"], target_parameters=experts)


def deepseek_v3():
    return moe(
        "DeepseekV3", moe_intermediate_size=12, n_routed_experts=4, n_shared_experts=1, n_group=2,
        topk_group=1, first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4,
        v_head_dim=8, qk_nope_head_dim=8, num_key_value_heads=2, head_dim=4,
    )  # fmt: skip


def llama4():
    """Experts that are given all tokens, multiplied by their scores; a layer without, and positions
    in one of the two."""
    needs_mixtures()
    torch.manual_seed(0)
    config = transformers.Llama4TextConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=12, intermediate_size_mlp=24,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        num_local_experts=4, num_experts_per_tok=2, moe_layers=[1], no_rope_layers=[1, 0],
        attention_chunk_size=6, max_position_embeddings=32, pad_token_id=0, use_cache=False,
    )  # fmt: skip
    return shaken(transformers.Llama4ForCausalLM(config))


def aria():
    """Experts whose weights are stored the other way round."""
    needs_mixtures()
    torch.manual_seed(0)
    config = transformers.AriaTextConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0,
        moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1, experts_implementation="eager",
    )  # fmt: skip
    return shaken(transformers.AriaTextForCausalLM(config))


def nemotron_h():
    """Mamba 2, attention, and experts without a gate."""
    return moe(
        "NemotronH", layers_block_type=["mamba", "moe", "attention"], n_routed_experts=4,
        moe_intermediate_size=12, moe_shared_expert_intermediate_size=12, moe_latent_size=8,
        mamba_num_heads=4, mamba_head_dim=8, n_groups=2, ssm_state_size=4,
    )  # fmt: skip


def qwen3_next():
    return moe(
        "Qwen3Next", num_experts=4, moe_intermediate_size=12, shared_expert_intermediate_size=12,
        linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip


def jamba():
    return moe(
        "Jamba", num_experts=4, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
        expert_layer_offset=1, mamba_d_state=4, mamba_dt_rank=4,
    )  # fmt: skip


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
    "rwkv": lambda: causal("Rwkv", attention_hidden_size=16, context_length=32),
    "bloom": lambda: causal("Bloom", n_head=2, n_layer=2, hidden_dropout=0, attention_dropout=0),
    "gpt-neox": lambda: causal("GPTNeoX"),
    "gpt-neo": gpt_neo,
    "opt": opt,
    "phi": lambda: causal("Phi"),
    "hand-written": lambda: shaken(HandWritten()),
    "phi3": lambda: causal("Phi3"),
    "bert": lambda: WithMask(bert()),
    "deberta": lambda: WithMask(deberta("Deberta")),
    "deberta-v2": lambda: WithMask(
        deberta(position_buckets=8, norm_rel_ebd="layer_norm", conv_kernel_size=3)
    ),
    "deberta-v3": lambda: WithMask(
        deberta(position_buckets=8, norm_rel_ebd="layer_norm", share_att_key=True)
    ),
    "deberta-lora": lambda: WithMask(
        adapters(
            r=4,
            model=deberta(share_att_key=True),
            target_modules=["query_proj", "value_proj"],
            task_type=None,
        )
    ),
    "t5": lambda: Shifted(t5()),
    "lora": lora,
    "dora": functools.partial(adapters, r=4, use_dora=True),
    "ia3": functools.partial(adapters, "IA3Config", feedforward_modules=["down_proj"]),
    "vera": functools.partial(adapters, "VeraConfig", r=4, target_modules=["q_proj", "v_proj"]),
    "lokr": functools.partial(adapters, "LoKrConfig", r=4),
    "adalora": functools.partial(adapters, "AdaLoraConfig", init_r=4, target_r=2, total_step=9),
    "dora-gpt2": lambda: adapters(
        r=4, use_dora=True, model=tiny_gpt2(), target_modules=["c_attn"], fan_in_fan_out=True
    ),
    "loha": functools.partial(adapters, "LoHaConfig", r=4),
    "c3a": functools.partial(adapters, "C3AConfig", block_size=4, target_modules=["q_proj"]),
    "boft": functools.partial(adapters, "BOFTConfig", boft_block_size=4),
    "oft": functools.partial(adapters, "OFTConfig", r=0, oft_block_size=4),
    "hra": functools.partial(adapters, "HRAConfig", r=4),
    "prefix-tuning": functools.partial(adapters, "PrefixTuningConfig", num_virtual_tokens=3),
    "t5-untied": lambda: Shifted(t5(tie_word_embeddings=False, feed_forward_proj="gated-gelu")),
    "mixtral": lambda: moe("Mixtral", num_local_experts=4),
    "gpt-oss": lambda: moe("GptOss", num_local_experts=4),
    "mixtral-lora": lora_of_experts,
    "gpt-oss-lora": lambda: lora_of_experts("GptOss"),
    "aria": aria,
    "llama4": llama4,
    "nemotron-h": nemotron_h,
    "qwen2-moe": lambda: moe(
        "Qwen2Moe", num_experts=4, moe_intermediate_size=12, shared_expert_intermediate_size=12
    ),
    "deepseek-v3": deepseek_v3,
    "granite-moe": lambda: moe("GraniteMoe", num_local_experts=4),
    "jamba": jamba,
    "qwen3-next": qwen3_next,
    "lfm2": lambda: causal("Lfm2", layer_types=["conv", "full_attention"], block_ff_dim=24),
    "qwen3-moe": lambda: moe("Qwen3Moe", num_experts=4, moe_intermediate_size=12),
}


class Checkpointing(nn.Module):
    """A model of one's own that is told to checkpoint as transformers' models are."""

    checkpoint_options = None

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs):
        self.checkpoint_options = gradient_checkpointing_kwargs

    def maybe_again(self, function, *args):
        options = self.checkpoint_options
        return function(*args) if options is None else checkpoint(function, *args, **options)


class SharedLayers(Checkpointing, SharedEverything):
    """Embeddings, shared layers and head, each used twice; in checkpoints, one is nested, and two
    get equal ids."""

    def forward(self, ids):
        again = self.maybe_again
        # A reentrant checkpoint passes gradients on only if one of its inputs needs them.
        handle = torch.zeros((), device=ids.device, requires_grad=True)
        look = lambda ids, handle: self.source(ids) + 0.5 * self.target((7 * ids + 1) % 30) + handle
        x = again(look, ids, handle) + again(look, ids, handle)
        mix = lambda x: torch.tanh(self.mix(self.norm(x)))
        x = again(lambda x: again(mix, x), again(mix, x))
        return again(self.head, x)


class Convolutions2d(Checkpointing):
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
        x = self.maybe_again(self.net[1:], self.net[0](x))
        return self.head(x.mean((2, 3)))


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

    def __init__(self, width=10):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(width))

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
    return shaken(transformers.ViTForImageClassification(config))


class TimeFirst(Checkpointing):
    """A language model that works on (T, rows), as PyTorch's own examples do."""

    def __init__(self, positions=lambda T, rows: torch.arange(T)[:, None].expand(T, rows)):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.positions = nn.Embedding(30, 16), nn.Embedding(32, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 24, 0.0)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.head = nn.RMSNorm(16), nn.Linear(16, 30)
        self.position_ids = positions

    def forward(self, ids):
        ids = ids.t()
        positions = self.position_ids(*ids.shape).to(ids.device)
        positions = self.positions(positions).view(len(ids), -1, 16)
        x = self.tokens(ids) + positions
        mask = nn.Transformer.generate_square_subsequent_mask(len(ids), ids.device, x.dtype)
        x = self.maybe_again(lambda x: self.layers(x, mask=mask, is_causal=True), x)
        return self.head(self.norm(x)).transpose(0, 1)


class CastLinear(nn.Linear):
    """Parameters of one dtype for inputs of another, as in hand-written mixed precision."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x))


class GatedBlock(nn.Module):
    """Attention and MLP around which scalars train, with values that come from a table."""

    def __init__(self, width, heads):
        super().__init__()
        linear = lambda a, b: CastLinear(a, b, bias=False)
        self.heads, self.qkv, self.out = heads, linear(width, 3 * width), linear(width, width)
        self.up, self.down = linear(width, 4 * width), linear(4 * width, width)
        self.gate, self.lambdas = linear(4, heads), nn.Parameter(torch.tensor([1.0, 0.7, 0.5]))

    def forward(self, x, values):
        norm = lambda x: F.rms_norm(x, x.shape[-1:])
        q, k, v = (y.unflatten(2, (self.heads, -1)) for y in self.qkv(norm(x)).chunk(3, -1))
        if values is not None:
            gate = 2 * torch.sigmoid(self.gate(x[..., :4]))[..., None]
            v = v + self.lambdas[2] * gate * values.view(v.shape)
        q, k, v = (y.transpose(1, 2) for y in (norm(q), norm(k), v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.lambdas[0] * self.out(mixed)
        return x + self.lambdas[1] * self.down(F.relu(self.up(norm(x))).square())


class HandWritten(nn.Module):
    """What people train records with: a GPT whose own scalars weigh the layers' inputs, a table of
    values, capped logits of a padded vocabulary."""

    def __init__(self, width=16, layers=2, vocab=VOCAB):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.values = nn.Embedding(vocab, width), nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(GatedBlock(width, 2) for _ in range(layers))
        self.of_x, self.of_first = (nn.Parameter(torch.linspace(0.5, 1, layers)) for _ in range(2))
        self.head, self.vocab = CastLinear(width, vocab + 3), vocab

    def forward(self, ids):
        x = first = F.rms_norm(self.tokens(ids), (self.tokens.embedding_dim,))
        for i, block in enumerate(self.blocks):
            x = self.of_x[i] * x + self.of_first[i] * first
            x = block(x, self.values(ids) if i else None)
        logits = self.head(F.rms_norm(x, x.shape[-1:]))[..., : self.vocab]
        return 15 * torch.tanh(logits / 15)


class OneSequence(nn.Module):
    """All rows' tokens one after the other in one row, as Pixtral has its patches; `last` may do what
    it wants with it."""

    def __init__(self, last=None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.rms = nn.Linear(10, 8), nn.RMSNorm(8)
        self.norm, self.head, self.last = nn.LayerNorm(8), nn.Linear(8, 5), last

    def forward(self, x):
        one = self.norm(torch.tanh(self.rms(self.first(x.flatten(0, 1)[None]))))
        one = one if self.last is None else self.last(one)
        return self.head(one.view(len(x), -1, 8).mean(1))


class OfPixels(nn.Module):
    """The logits that a model of transformers has of its pixels."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(pixel_values=x).logits


def swin_v2():
    """Windows of an image, (rows·windows, tokens, d)."""
    torch.manual_seed(0)
    config = transformers.Swinv2Config(
        image_size=16, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=4,
        drop_path_rate=0.0, num_labels=5,
    )  # fmt: skip
    return shaken(OfPixels(transformers.Swinv2ForImageClassification(config)))


def timesformer():
    """Frames of a film, (rows·frames, channels, height, width)."""
    torch.manual_seed(0)
    config = transformers.TimesformerConfig(
        image_size=16, patch_size=8, num_frames=3, hidden_size=16, intermediate_size=24,
        num_hidden_layers=2, num_attention_heads=2, drop_path_rate=0, num_labels=5,
    )  # fmt: skip
    return shaken(OfPixels(transformers.TimesformerForVideoClassification(config)))


OTHER_MODELS = {
    "swin-v2": (swin_v2, (3, 16, 16)),
    "timesformer": (timesformer, (3, 3, 16, 16)),
    "vit": (vit, (3, 8, 8)),
    "conv2d": (lambda: shaken(Convolutions2d()), (3, 9, 9)),
    "conv1d": (lambda: shaken(Convolutions1d()), (6, 12)),
    "bare-parameters": (lambda: shaken(Tokens()), (8, 10)),
    "one-sequence": (lambda: shaken(OneSequence()), (7, 10)),
}
