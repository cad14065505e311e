"""Checkpoints of a run: what comes back, what stays tied, and which are passed over."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from graddot_lm.errors import GraddotError
from graddot_lm.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from torch import nn


def state_at(step: int) -> dict:
    return {"model": {"w": torch.full((50,), float(step))}, "data": {"epoch": step}}


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(11, 6)
        self.norm = nn.LayerNorm(6)
        self.lm_head = nn.Linear(6, 11, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits = self.lm_head(nn.functional.dropout(self.norm(self.wte(ids)), 0.5))
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())


def trainee() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(5)
    model = Tied()
    groups = [{"params": [model.wte.weight]}, {"params": model.norm.parameters(), "lr": 1 / 3}]
    return model, torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), amsgrad=True)


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, draws, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = model(torch.from_numpy(draws.integers(0, 11, (4, 7))))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def same(a, b) -> bool:
    """Equal in every bit and type, whatever the nesting."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and repr(a) == repr(b)


def test_training_goes_on_bit_by_bit_from_a_checkpoint(tmp_path):
    model, optimizer = trainee()
    draws = np.random.default_rng(2)
    advance(model, optimizer, draws, 3)
    state = {
        "model": dict(model.state_dict()),
        "optimizer": optimizer.state_dict(),
        "data": {"generator": draws.bit_generator.state},  # integers of 128 bits
        "rng": {"torch": torch.get_rng_state(), "python": random.Random(1).getstate()},
    }
    path = save_checkpoint(tmp_path, 3, state)
    loaded = load_checkpoint(path)
    assert loaded.step == 3
    assert same(loaded.state, state)
    wanted = advance(model, optimizer, draws, 3)

    other, other_optimizer = trainee()
    other.load_state_dict(loaded.state["model"])
    other_optimizer.load_state_dict(loaded.state["optimizer"])
    other_draws = np.random.default_rng(0)
    other_draws.bit_generator.state = loaded.state["data"]["generator"]
    torch.set_rng_state(loaded.state["rng"]["torch"])
    assert advance(other, other_optimizer, other_draws, 3) == wanted
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    assert same(load_checkpoint(path).state["rng"], state["rng"])  # training left the file alone


def test_tied_tensors_are_stored_once_and_come_back_tied(tmp_path):
    model, _ = trainee()
    path = save_checkpoint(tmp_path, 0, {"model": model.state_dict()})
    weights = load_checkpoint(path).state["model"]
    assert weights["wte.weight"] is weights["lm_head.weight"]
    stored = (path / "tensors.safetensors").read_bytes()
    assert stored.count(model.wte.weight.detach().numpy().tobytes()) == 1


def test_views_scalars_and_odd_values_come_back_equal(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    state = {
        "views": [base, base[1:], base.T, base[:, ::2], base[0, 0]],
        "kinds": {d: torch.ones(3, dtype=getattr(torch, d)) for d in ("bfloat16", "bool", "uint8")},
        "empty": [torch.empty(0, 3), torch.empty(0, 5), {}, [], ()],
        "keys": {1: torch.zeros(1), "1": torch.ones(1), (2, 3): None},
        "floats": [0.1, 1e-323, -0.0, float("inf"), float("nan"), 2**200, True],
        "numpy": np.random.RandomState(1).get_state(),
    }
    assert same(load_checkpoint(save_checkpoint(tmp_path, 0, state)).state, state)


def test_what_cannot_be_saved_is_named_and_leaves_nothing(tmp_path):
    with pytest.raises(TypeError, match="data.seen.0: a checkpoint cannot hold a set"):
        save_checkpoint(tmp_path, 0, {"data": {"seen": [{1}]}})
    assert names(tmp_path) == []


def test_the_last_are_kept_and_a_damaged_one_is_passed_over(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for step in (8, 9, 10, 11):
        save_checkpoint(folder, step, state_at(step), keep=3)
    assert names(folder) == ["step-10", "step-11", "step-9"]
    save_checkpoint(folder, 11, state_at(12), keep=3)  # there already
    assert load_checkpoint(folder / "step-11").state["data"] == state_at(11)["data"]
    with pytest.raises(ValueError, match="there is one at step 11"):
        save_checkpoint(folder, 10, state_at(10))
    os.truncate(folder / "step-11" / "tensors.safetensors", 100)
    (folder / "step-10" / "state.json").unlink()
    assert latest_checkpoint(tmp_path) == folder / "step-9"
    with pytest.raises(GraddotError, match="not a complete checkpoint"):
        load_checkpoint(folder / "step-11")
    save_checkpoint(folder, 11, state_at(11))
    assert load_checkpoint(folder / "step-11").state["data"] == state_at(11)["data"]


def test_a_checkpoint_with_a_tensor_missing_is_refused(tmp_path):
    path = save_checkpoint(tmp_path, 0, state_at(0))
    content = json.loads((path / "state.json").read_text())
    text = json.dumps(content).replace("model.w", "model.v")
    (path / "state.json").write_text(text)
    with pytest.raises(GraddotError, match="damaged: 'model.v'; if you take this folder away, the"):
        load_checkpoint(path)
    (path / "state.json").write_text(json.dumps({**content, "step": 7}))
    with pytest.raises(GraddotError, match="damaged: state.json is of step 7"):
        load_checkpoint(path)


def test_what_is_no_checkpoint_is_passed_over(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for step in (1, 2):
        save_checkpoint(folder, step, state_at(step))
    (folder / "step-2" / "state.json").write_text("[]")
    (folder / "step-3").write_text("a file")
    (folder / "step-4" / "state.json").mkdir(parents=True)
    assert latest_checkpoint(tmp_path) == folder / "step-1"


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
def test_a_flipped_byte_is_noticed(tmp_path, name):
    path = save_checkpoint(tmp_path, 3, {"model": {"w": torch.ones(50)}, "data": {"epoch": 41}})
    file, before = path / name, load_checkpoint(path)
    content = file.read_bytes()
    at = content.index(b"41") if name == "state.json" else len(content) - 7
    file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    want = f"step-3: damaged: {name} is not what was saved, by its checksum; if you take this"
    with pytest.raises(GraddotError, match=want):
        load_checkpoint(path)
    file.write_bytes(content)
    assert same(load_checkpoint(path).state, before.state)


def test_a_checkpoint_of_an_older_version_has_no_checksums(tmp_path):
    path = save_checkpoint(tmp_path, 3, state_at(3))
    content = json.loads((path / "state.json").read_text())
    del content["checksums"]
    (path / "state.json").write_text(json.dumps(content))
    assert load_checkpoint(path).state["data"] == {"epoch": 3}
