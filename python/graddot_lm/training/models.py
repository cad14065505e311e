"""GPT-2 in its published sizes, with the head that both training methods use."""

from typing import Any

from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from ..errors import GraddotError
from ..fused_head import fuse_head
from .architectures import ARCHITECTURES


def build_gpt2(architecture: str, vocab_size: int, block_size: int, dropout: float) -> nn.Module:
    """A GPT-2 with random weights, drawn from torch's default generator, and a fused head.

    `labels=` are the targets of their own positions: the data shifts them.
    Raises GraddotError for an architecture that is not in ARCHITECTURES.
    """
    if architecture not in ARCHITECTURES:
        raise GraddotError(
            f"unknown architecture {architecture!r}; expected one of {', '.join(ARCHITECTURES)}"
        )
    sizes: dict[str, Any] = ARCHITECTURES[architecture]
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=block_size,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        activation_function="gelu_pytorch_tanh",  # gelu_new's formula in one kernel
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
        **sizes,
    )
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # what GPT-2 gets anyway, but with a warning
    return fuse_head(model, label_shift=0)
