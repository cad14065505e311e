"""Definitions that tests compare with: float64, one backward per sample, none of our code."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel


def tiny_gpt2(*, tied: bool = True, vocab: int = 61, layers: int = 2, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocab,
        n_positions=32,
        n_embd=24,
        n_layer=layers,
        n_head=2,
        tie_word_embeddings=tied,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    model.loss_type = (
        "ForCausalLM"  # what it gets anyway, but with a warning, in compiled graphs too
    )
    # Away from the initial biases of 0 and norm weights of 1, where mistakes can cancel.
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model.train()


def lm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the labels that are not -100; position t predicts label t+1."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def token_batch(rows: int, tokens: int, vocab: int = 61, *, seed: int, ragged: bool = False):
    """Token ids (rows, tokens) and labels, some of them -100 if ragged."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (rows, tokens), generator=g)
    labels = ids.clone()
    if ragged:
        for row, start in enumerate(torch.randint(6, tokens, (rows,), generator=g).tolist()):
            labels[row, start:] = -100
        labels[0, 1:4] = -100
    return ids, labels


def gradient(
    model: nn.Module, x: Tensor, y: Tensor, loss=lm_loss, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Gradient of the mean loss of a batch, by parameter, in float64 unless told otherwise."""
    exact = copy.deepcopy(model).to(dtype)
    exact.zero_grad(set_to_none=True)
    out = exact(x.to(dtype) if x.is_floating_point() else x)
    loss(getattr(out, "logits", out), y).backward()
    return {n: p.grad.clone() for n, p in exact.named_parameters() if p.grad is not None}


def sample_dots(model: nn.Module, train, val, loss=lm_loss):
    """⟨∇L_val, ∇L_i⟩ and its Cauchy-Schwarz scale ‖∇L_val‖·‖∇L_i‖, by parameter, (N,) each."""
    x, y = train
    val_grad = gradient(model, *val, loss=loss)
    samples = [gradient(model, x[i : i + 1], y[i : i + 1], loss=loss) for i in range(len(x))]
    for n, g in val_grad.items():
        for own in samples:
            own.setdefault(n, torch.zeros_like(g))  # of an expert that the sample does not use
    dots = {n: torch.stack([(g * s[n]).sum() for s in samples]) for n, g in val_grad.items()}
    scales = {
        n: torch.stack([g.norm() * s[n].norm() for s in samples]) for n, g in val_grad.items()
    }
    return dots, scales


def norm(grads: dict[str, Tensor]) -> Tensor:
    """Norm of a gradient over all parameters, 0-dim."""
    return torch.stack([g.norm() for g in grads.values()]).norm()


def total(by_parameter: dict[str, Tensor]) -> Tensor:
    """Sum over parameters, (N,)."""
    return torch.stack(list(by_parameter.values())).sum(0)
