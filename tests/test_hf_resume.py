"""Runs of GradDotProdTrainer that stop midway and go on: every row is there once."""

import pytest
import torch
from brute_force import tiny_gpt2
from graddot_lm import GraddotError
from graddot_lm.background import BackgroundWriter
from graddot_lm.hf import GradDotProdTrainer
from hf_runs import (
    TRAIN,
    VAL,
    Snapshots,
    arguments,
    brute_force,
    check_steps,
    collate,
    rows_of,
    scored,
    train,
)
from transformers import (
    Trainer,
    TrainerCallback,
)
from transformers.trainer_utils import HPSearchBackend


def test_resumed_run_has_every_row_once(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    _, whole = train(tmp_path / "whole", tiny_gpt2(), **options)
    train(tmp_path / "cut", tiny_gpt2(), **options)
    checkpoint = str(tmp_path / "cut" / "checkpoint-2")
    _, resumed = train(tmp_path / "cut", tiny_gpt2(), resume=checkpoint, **options)
    assert [(r["step"], r["sample_id"]) for r in resumed] == [
        (r["step"], r["sample_id"]) for r in whole
    ]
    for got, want in zip(resumed, whole, strict=True):
        assert got["dot"] == pytest.approx(want["dot"], rel=1e-4, abs=1e-6)
    with pytest.raises(GraddotError, match="holds the scores of an earlier run"):
        train(tmp_path / "cut", tiny_gpt2(), **options)


def test_runs_of_one_trainer(tmp_path):
    """Their scores are where its output_dir is then; an earlier run's stay as they are."""
    trainer = scored(tmp_path / "one", tiny_gpt2())
    trainer.train()
    with pytest.raises(GraddotError, match="holds the scores of an earlier run"):
        trainer.train()
    trainer.args.output_dir = str(tmp_path / "two")
    trainer.train()
    ids = [[row["sample_id"] for row in rows_of(tmp_path / x / "scores")] for x in ("one", "two")]
    assert ids[0] == ids[1] and len(ids[0]) == 18


class Trial(dict):
    """As a search's, of the hyperparameters it holds."""

    def __init__(self, number, **parameters):
        super().__init__(parameters)
        self.number, self.params = number, parameters


def test_a_model_for_every_run(tmp_path, close, monkeypatch):
    """By model_init, and in a search the scores of every trial in its own folder."""
    args = arguments(tmp_path, remove_unused_columns=False)
    trainer = GradDotProdTrainer(
        model_init=lambda: tiny_gpt2(),
        args=args,
        data_collator=collate,
        train_dataset=TRAIN,
        val_dataset=VAL,
    )
    snapshots = Snapshots()
    trainer.add_callback(snapshots)
    trainer.train()
    # A search's own package may not be here; its trials are told by their type.
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
    trainer.hp_search_backend, trainer.hp_name = HPSearchBackend.OPTUNA, None
    trainer.hp_space = lambda trial: trial
    for number, rate in enumerate((0.01, 0.03)):
        trainer.train(trial=Trial(number, learning_rate=rate))
    for i, (folder, rate) in enumerate([("", 0.02), ("run-0", 0.01), ("run-1", 0.03)]):
        rows = rows_of(tmp_path / folder / "scores")
        assert rows[0]["lr"] == pytest.approx(rate) and len(rows) == 18
        for step, model in enumerate(snapshots.models[3 * i : 3 * i + 3]):
            at = [row for row in rows if row["step"] == step]
            dots, scales, _ = brute_force(model, TRAIN, VAL, [row["sample_id"] for row in at])
            got = torch.tensor([row["dot"] for row in at], dtype=torch.float64)
            close(got, dots, 1e-5, scales)


def test_rows_of_steps_that_are_not_taken_again_are_dropped(tmp_path):
    """Where a run that went on is taken up from a checkpoint, to end there."""
    options = {"save_strategy": "steps", "save_steps": 4}  # an epoch
    train(tmp_path, tiny_gpt2(), max_steps=6, **options)
    checkpoint = str(tmp_path / "checkpoint-4")
    _, rows = train(tmp_path, tiny_gpt2(), max_steps=4, resume=checkpoint, **options)
    assert {row["step"] for row in rows} == {0, 1, 2, 3}


@pytest.mark.parametrize("when", ["on_pre_optimizer_step", "on_substep_end"])
def test_an_interrupted_trainer_goes_on(tmp_path, monkeypatch, when):
    """The same one, as in a notebook: nothing of the step that was cut off is in its values."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    _, whole = train(tmp_path / "whole", tiny_gpt2(), **options)
    trainer = scored(tmp_path / "cut", tiny_gpt2(), **options)

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("graddot_lm.hf._ScoreCallback." + when, interrupt)
        trainer.train()
    trainer.train(resume_from_checkpoint=True)
    rows = rows_of(tmp_path / "cut" / "scores")
    assert [row["sample_id"] for row in rows] == [row["sample_id"] for row in whole]
    for got, want in zip(rows, whole, strict=True):
        assert got["value"] == pytest.approx(want["value"], rel=1e-4, abs=1e-8)


def test_an_epoch_that_ends_in_the_midst_of_a_step(tmp_path, close):
    """Trainer adds the gradients of what is left of it to the next epoch's first step, and so are the
    rows."""

    class Ends(TrainerCallback):
        ended = False

        def on_substep_end(self, args, state, control, **kwargs):
            if state.global_step == 1 and not self.ended:
                control.should_epoch_stop = self.ended = True

    snapshots = Snapshots()
    trainer = scored(tmp_path, tiny_gpt2(), max_steps=5)  # of two epochs
    trainer.add_callback(Ends())
    trainer.add_callback(snapshots)
    trainer.train()
    rows = rows_of(tmp_path / "scores")
    assert [row["step"] for row in rows] == [0] * 6 + [1] * 9 + [2] * 6 + [3] * 6 + [4] * 2
    models = [*snapshots.models, trainer.model.double()]
    assert check_steps(models, rows, TRAIN, VAL, close) == 5


def test_rows_are_saved_before_the_checkpoint_that_counts_on_them(tmp_path, monkeypatch):
    saved = []

    def save(self, *_):
        saved.append((self.state.global_step, len(rows_of(tmp_path))))

    monkeypatch.setattr(Trainer, "_save_checkpoint", save)
    train(tmp_path, tiny_gpt2(), save_strategy="steps", save_steps=1)
    assert saved == [(1, 6), (2, 12), (3, 18)]


def test_rows_are_saved_every_so_often(tmp_path, monkeypatch):
    """Also where no checkpoint is: a run that is killed leaves what was saved."""
    monkeypatch.setattr("graddot_lm.hf._SAVED_EVERY", 2)

    class Killed(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4:
                raise KeyboardInterrupt

    trainer = scored(tmp_path, tiny_gpt2(), max_steps=6)
    trainer.add_callback(Killed())
    flush, saved = BackgroundWriter.flush, []

    def noted(self, wait=True):
        flush(self)  # waits, for the count
        saved.append(len(rows_of(tmp_path / "scores")))

    monkeypatch.setattr(BackgroundWriter, "flush", noted)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert saved[:2] == [12, 20]  # an epoch ends with a smaller step
