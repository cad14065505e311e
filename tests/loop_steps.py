"""What the tests of loops share: steps, collated batches, comparisons."""

import copy

import torch
from brute_force import lm_loss, token_batch
from graddot_lm import GradDotProdEngine
from transformers import BertConfig, BertForSequenceClassification


class Store:
    """Keeps the rows, column by column."""

    def __init__(self):
        self.columns = {}

    def append(self, rows, step):
        for name, values in rows.items():
            self.columns.setdefault(name, []).extend(torch.as_tensor(values, device="cpu").tolist())

    def column(self, name):
        return torch.tensor(self.columns.pop(name), dtype=torch.float64)


def run(engine, train, step=0, *, loss=lm_loss, factor=1.0):
    """One micro-batch of a loop with a loss of its own, up to prepare_gradients."""
    engine.attach_train_batch(*train, step, torch.arange(len(train[1])))
    x, y = engine.prepare_forward_input(*train)
    out = engine.model(x)
    (engine.track_loss(loss(getattr(out, "logits", out), y)) * factor).backward()
    engine.prepare_gradients()


def attached(model, val=None, optimizer=None, **kwargs):
    engine = GradDotProdEngine(model, val, **{"label_shift": 1, **kwargs})
    engine.attach(optimizer)
    return engine


def same_gradients(model, want, tolerance):
    # Gradients that are zero but for rounding, as of BERT's key biases, have no relative accuracy.
    whole = torch.stack([g.norm() for g in want.values()]).norm()
    for name, p in model.named_parameters():
        error = (p.grad.double() - want[name]).norm() / (want[name].norm() + 1e-3 * whole)
        assert error <= tolerance, name


def padded(rows, lengths, *, seed, vocab=61, pad=0):
    """A collated batch: input_ids, attention_mask and labels, -100 on the padding."""
    ids, labels = token_batch(rows, max(lengths), vocab, seed=seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids[~mask], labels[~mask] = pad, -100
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def mapping_gradient(model, batch):
    exact = copy.deepcopy(model).double()
    exact.zero_grad()
    exact(**batch).loss.backward()
    return {n: p.grad.clone() for n, p in exact.named_parameters() if p.grad is not None}


def mapping_dots(model, train, val):
    """Scores and their scale by brute force; every row is cut to its own length, without mask."""
    direction, dots, scales = mapping_gradient(model, val), [], []
    norm = torch.stack([d.norm() for d in direction.values()]).norm()
    for i in range(len(train["labels"])):
        n = int(train["attention_mask"][i].sum()) if "attention_mask" in train else None
        row = {k: v[i : i + 1, :n] if v.dim() > 1 else v[i : i + 1] for k, v in train.items()}
        row.pop("attention_mask", None)
        own = mapping_gradient(model, row)
        dots.append(sum((direction[n] * own[n]).sum() for n in direction))
        scales.append(norm * torch.stack([g.norm() for g in own.values()]).norm())
    return torch.stack(dots), torch.stack(scales)


def tiny_bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=61,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        num_labels=3,
        hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
    )
    return BertForSequenceClassification(config).double()


def loss_of_logits(model, x, y):
    return lm_loss(model(x).logits, y)
