"""`graddot train` from the command line: exact scores on disk, and what else a run records."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from brute_force import gradient, norm, sample_dots, total
from graddot_lm import cli
from graddot_lm.results.excerpts import escape
from graddot_lm.store import read_scores
from graddot_lm.text.data import TokenData, fixed_batch
from graddot_lm.text.load_tokenizer import load_tokenizer
from graddot_lm.training.architectures import ARCHITECTURES
from graddot_lm.training.models import build_gpt2
from graddot_lm.training.settings import read_config
from graddot_lm.training.train import TrainingRun
from train_runs import FP64, assert_same_run, final_state, tokens, train

__all__ = ["tokens"]  # the fixture


def test_stored_scores_equal_brute_force(tokens, tmp_path):
    assert train(tokens, tmp_path, "--val_set sums --learning_rate 0 --train_set prose,sums") == 0
    torch.manual_seed(7)
    model = build_gpt2("GPT2-Tiny", 300, 24, dropout=0.0)  # as it was: the learning rate is 0
    val_data = TokenData(tokens, "val", ["sums"], 24)
    val = val_data.get(fixed_batch(val_data, 2, seed=7))
    data = TokenData(tokens, "train", None, 24)
    rows = read_scores(tmp_path / "run").to_pylist()
    assert len(rows) == 8 * 4 and {row["domain"] for row in rows} == {"prose", "sums"}

    def loss(logits, labels):
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    ids = [row["sample_id"] for row in rows[:6]]
    want, scales = sample_dots(model, data.get(ids), val, loss=loss)
    got = torch.tensor([row["dot"] for row in rows[:6]])
    assert ((got - total(want)).abs() / total(scales)).max() <= 1e-6
    assert [row["offset"] for row in rows[:6]] == data.offset_of(ids).tolist()
    assert all(row["n_tokens"] == 24 and row["loss"] > 0 for row in rows)


def test_norms_are_written_and_resumed(tokens, tmp_path, capsys):
    """Columns norm and cosine; all else, and a run without, is as it was."""
    assert train(tokens, tmp_path / "plain", "--learning_rate 0") == 0
    assert "norms" not in read_config(tmp_path / "plain" / "run")
    assert train(tokens, tmp_path, "--norms --learning_rate 0") == 0
    rows = read_scores(tmp_path / "run").to_pylist()
    for row, other in zip(rows, read_scores(tmp_path / "plain" / "run").to_pylist(), strict=True):
        assert row["dot"] == pytest.approx(other["dot"], rel=1e-5, abs=1e-6)
    torch.manual_seed(7)
    model = build_gpt2("GPT2-Tiny", 300, 24, dropout=0.0)
    val_data, data = TokenData(tokens, "val", None, 24), TokenData(tokens, "train", None, 24)
    loss = lambda logits, labels: F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    val = gradient(model, *val_data.get(fixed_batch(val_data, 2, seed=7)), loss=loss)
    for row in rows[:3]:
        own = gradient(model, *data.get([row["sample_id"]]), loss=loss)
        dot = sum((val[n] * own[n]).sum() for n in val)
        assert row["norm"] == pytest.approx(norm(own).item(), rel=1e-5)
        assert row["cosine"] == pytest.approx((dot / norm(own) / norm(val)).item(), abs=1e-5)
    assert train(tokens, tmp_path, "--resume --learning_rate 0") == 2
    assert "norms: true before, not set now" in capsys.readouterr().err
    assert train(tokens, tmp_path, "--resume --norms --learning_rate 0") == 0
    assert len(read_scores(tmp_path / "run", ["norm"])) == len(rows)
    assert cli.main(["scores", str(tmp_path / "run")]) == 0


def test_each_domain_is_a_target_of_its_own(tokens, tmp_path, capsys):
    """Its scores are those of a run about it alone; the report compares them, or shows one."""
    fixed = f"--learning_rate 0 {FP64}"
    targets = "--target_per_domain --val_set prose,sums --norms"
    assert train(tokens, tmp_path, f"{fixed} {targets}") == 0
    both = read_scores(tmp_path / "run")
    for name in ("prose", "sums"):
        assert train(tokens, tmp_path / name, f"{fixed} --val_set {name} --norms") == 0
        alone = read_scores(tmp_path / name / "run")
        assert both["sample_id"].equals(alone["sample_id"])
        for column in ("dot", "value", "cosine"):
            got = both[f"{column}_{name}"].to_numpy()
            assert got == pytest.approx(alone[column].to_numpy(), rel=1e-10), column
    capsys.readouterr()
    run = str(tmp_path / "run")
    assert cli.main(["scores", run, "--by", "dot"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "for each of 2 targets" in lines[0]
    start = lines.index("mean dot ± standard error, by training domain (rows) and target:") + 1
    assert lines[start].split() == ["domain", "samples", "rows", "prose", "sums"]
    domains = both["domain"].to_numpy(zero_copy_only=False)
    for line, domain in zip(lines[start + 1 :], ("prose", "sums", "shout"), strict=False):
        assert line.split()[0] == domain
        for column, target in ((3, "prose"), (6, "sums")):
            mean = both[f"dot_{target}"].to_numpy()[domains == domain].mean()
            assert line.split()[column] == f"{mean:.3e}"
    assert cli.main(["scores", run, "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["targets"]) == ["prose", "sums"]
    assert cli.main(["scores", run, "--target", "sums"]) == 0
    shown = capsys.readouterr().out.split("validation sequences, which the scores are about")[1]
    assert shown.startswith(" (all 2)") and shown.count("sums ") == 2 and "prose" not in shown
    assert cli.main(["scores", run, "--csv", str(tmp_path / "all.csv")]) == 2
    assert "name one of prose, sums" in capsys.readouterr().err
    assert train(tokens, tmp_path, f"{fixed} --val_set prose,sums --norms --resume") == 2
    assert "target_per_domain: true before, not set now" in capsys.readouterr().err
    assert train(tokens, tmp_path, f"{fixed} {targets} --resume") == 0


@pytest.mark.parametrize("extra", ["", "--target_per_domain --norms --grad_clip 0.7"])
def test_accumulation_changes_neither_weights_nor_scores(tokens, tmp_path, extra):
    runs = []
    for steps in (1, 2, 4):
        runs.append(tmp_path / str(steps))
        command = f"{FP64} {extra} --gradient_accumulation_steps {steps}"
        assert train(tokens, runs[-1], command) == 0
    whole, rows = final_state(runs[0])["model"], read_scores(runs[0] / "run")
    for run in runs[1:]:
        for name, tensor in final_state(run)["model"].items():
            assert (tensor - whole[name]).norm() <= 1e-9 * whole[name].norm(), name
        found = read_scores(run / "run")
        assert found.schema == rows.schema
        for name in rows.column_names:
            if name in ("domain", "step", "sample_id", "offset", "n_tokens", "applied"):
                assert found[name].to_pylist() == rows[name].to_pylist(), name
            else:
                scale = abs(rows[name].to_numpy()).max()
                error = abs(found[name].to_numpy() - rows[name].to_numpy()).max()
                assert error <= (1e-6 if name == "loss" else 1e-9) * scale, name


def test_compiled_run(tokens, tmp_path, monkeypatch):
    """Weights and scores are those of an uncompiled one, but for rounding; it may go on as one."""
    monkeypatch.setitem(ARCHITECTURES["GPT2-Tiny"], "n_layer", 1)
    extra = "--lr_schedule constant"
    assert train(tokens, tmp_path / "plain", extra) == 0
    assert train(tokens, tmp_path, f"{extra} --compile --max_steps 5") == 0
    assert train(tokens, tmp_path, f"{extra} --resume") == 0
    got, want = read_scores(tmp_path / "run"), read_scores(tmp_path / "plain" / "run")
    assert got["sample_id"].equals(want["sample_id"])
    for name in ("dot", "value", "loss"):
        error = abs(got[name].to_numpy() - want[name].to_numpy()).max()
        assert error <= 1e-4 * abs(want[name].to_numpy()).max(), name
    weights = final_state(tmp_path / "plain")["model"]
    for name, tensor in final_state(tmp_path)["model"].items():
        # A bias of keys has a gradient of rounding alone, of which AdamW makes steps.
        assert (tensor - weights[name]).norm() <= 1e-2 * weights[name].norm(), name


def test_accumulating_run_resumes_bit_exactly_with_its_overhead(tokens, tmp_path, capsys):
    extra = "--gradient_accumulation_steps 2 --lr_schedule constant --dropout 0.1"
    assert train(tokens, tmp_path / "whole", f"{extra} --measure_overhead 1") == 0
    assert read_config(tmp_path / "whole" / "run")["measured"]["overhead"] > -1
    assert train(tokens, tmp_path / "parts", f"{extra} --max_steps 5") == 0
    assert train(tokens, tmp_path / "parts", f"{extra} --resume") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    capsys.readouterr()
    assert train(tokens, tmp_path / "parts", "--lr_schedule constant --dropout 0.1 --resume") == 2
    assert "gradient_accumulation_steps: 2 before, not set now" in capsys.readouterr().err


@pytest.mark.parametrize("parts", [1, 2])
def test_regular_moves_the_weights_alike(tokens, tmp_path, parts):
    for method in ("GradDotProd", "Regular"):
        extra = f"--method {method} {FP64} --gradient_accumulation_steps {parts}"
        assert train(tokens, tmp_path / method, extra) == 0
    scored, regular = (final_state(tmp_path / m)["model"] for m in ("GradDotProd", "Regular"))
    for name, tensor in scored.items():
        assert (tensor - regular[name]).norm() <= 1e-9 * tensor.norm(), name


@pytest.mark.parametrize("grad_clip", ["0", "0.7", "1000"])
def test_value_is_the_learning_rate_times_the_share_times_the_dot_as_clipped(
    tokens, tmp_path, monkeypatch, grad_clip
):
    """What clipping multiplied the gradient by is seen on the gradient itself."""
    factors, clip = [], torch.nn.utils.clip_grad_norm_

    def noted(parameters, *args):
        parameters = list(parameters)
        flat = lambda: torch.cat([p.grad.flatten() for p in parameters]).double()
        before = flat().norm()
        result = clip(parameters, *args)
        factors.append((flat().norm() / before).item())
        return result

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", noted)
    assert train(tokens, tmp_path, f"--grad_clip {grad_clip}") == 0
    factors = factors or [1.0] * 8
    assert len(factors) == 8 and all((f < 0.9) == (grad_clip == "0.7") for f in factors)
    for row in read_scores(tmp_path / "run").to_pylist():
        plain = row["lr"] * row["dot"] / 4
        assert row["value"] == pytest.approx(plain * factors[row["step"]], rel=1e-6)


def test_bfloat16(tokens, tmp_path):
    assert train(tokens, tmp_path / "exact", "--learning_rate 0") == 0
    want = read_scores(tmp_path / "exact" / "run")["dot"].to_numpy()
    autocast = "--train_dtype bfloat16"
    for extra in ("", "--model_dtype bfloat16", "--gradient_accumulation_steps 2"):
        extra = f"{autocast} {extra}"
        results = tmp_path / extra.replace(" ", "")
        assert train(tokens, results, f"--learning_rate 0 {extra}") == 0
        got = read_scores(results / "run")["dot"].to_numpy()
        assert abs(got - want).max() <= 2e-2 * abs(want).max()


def test_a_report_is_awaited_on_its_own_device(monkeypatch):
    """With --device cuda:1 the current device is another, whose stream has no copy to wait for."""
    recorded = []
    event = SimpleNamespace(record=recorded.append)
    monkeypatch.setattr(torch.cuda, "Event", lambda blocking: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))
    run = SimpleNamespace(
        processes=SimpleNamespace(rank=0, world=1, device=torch.device("cpu"), summed=lambda x: x),
        run_dir=SimpleNamespace(failed=False),
        _signals=[0],
    )
    report, there = TrainingRun._report(run, torch.tensor([1.0, 3.0]))
    assert report.tolist() == [2, 0, 0]
    assert there is event and recorded == [run.processes.device]


def test_the_smallest_block(tokens, tmp_path):
    assert train(tokens, tmp_path, "--block_size 8 --max_steps 1") == 0


def test_the_report_shows_the_validation_sequences(tokens, tmp_path, capsys):
    assert train(tokens, tmp_path, "--max_steps 1 --val_set sums,prose") == 0
    data = TokenData(tokens, "val", ["sums", "prose"], 24)
    ids = fixed_batch(data, 2, seed=7).tolist()
    assert read_config(tmp_path / "run")["val_sample_ids"] == ids
    text = load_tokenizer(str(tokens)).decode(data.token_ids(ids[0]).tolist())
    place = f"{data.domain_of(ids)[0]:<6}  {data.offset_of(ids)[0]:>6}  "
    assert cli.main(["scores", str(tmp_path / "run"), "--top", "1"]) == 0
    out = capsys.readouterr().out
    assert "validation sequences, which the scores are about (the first 1 of 2):" in out
    assert place + escape(text) in out
    assert cli.main(["scores", str(tmp_path / "run")]) == 0
    assert "(all 2):" in capsys.readouterr().out
    meta = tokens / "meta.json"
    kept = meta.read_text()
    try:  # other data in the same place, whose training samples lie alike
        meta.write_text(kept.replace('"seed": 0', '"seed": 1'))
        assert cli.main(["scores", str(tmp_path / "run")]) == 0
    finally:
        meta.write_text(kept)
    assert "validation sequences" not in capsys.readouterr().out


def test_overhead_is_recorded(tokens, tmp_path, capsys):
    assert train(tokens, tmp_path, "--measure_overhead 1") == 0
    measured = read_config(tmp_path / "run")["measured"]
    assert measured["overhead"] > -1 and measured["overhead_over_regular_n"] > -1
    assert cli.main(["scores", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "prose" in out and "100.0% of the trainable elements" in out
