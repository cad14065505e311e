"""GPT-2 in its published sizes, and the loss that both training methods use."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from .errors import GraddotError

# Radford et al. (2019), table 2, but for Tiny, which trains in minutes on a CPU.
ARCHITECTURES = {
    "GPT2-Tiny": {"n_layer": 4, "n_head": 4, "n_embd": 128},
    "GPT2-Small": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "GPT2-Medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "GPT2-Large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "GPT2-XL": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
}

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def build_gpt2(architecture: str, vocab_size: int, block_size: int, dropout: float) -> nn.Module:
    """A GPT-2 with random weights, drawn from torch's default generator.

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
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
        **sizes,
    )
    return GPT2LMHeadModel(config)


def row_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the cross-entropy over each row's labels, (rows,), in fp32 (fp64 for fp64).

    logits (rows, T, vocab) and labels (rows, T), where labels[t] is the target of position t and
    -100 counts nothing.
    """
    flat = logits.flatten(0, 1)
    if flat.dtype != torch.float64:
        flat = flat.float()
    return F.cross_entropy(flat, labels.flatten(), reduction="none").view(labels.shape).sum(1)
