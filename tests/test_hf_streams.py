"""GradDotProdTrainer with iterable training sets: every row by its sample, and Trainer's weights."""

import datetime

import numpy as np
import pytest
import torch
from brute_force import tiny_gpt2
from datasets import Dataset
from graddot_lm import GraddotError
from graddot_lm.hf import content_id
from graddot_lm.indexed import ColumnId
from graddot_lm.results.score_figures import sample_table
from hf_runs import TRAIN, VAL, Stream, arguments, check_steps, collate, rows_of, train
from tokenizers import Tokenizer, models
from transformers import (
    BatchEncoding,
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    PreTrainedTokenizerFast,
    Trainer,
)

NUMBERED = [{**item, "number": 1000 + i} for i, item in enumerate(TRAIN)]


def stream():
    return Stream(TRAIN)


def hub_stream():
    set_ = Dataset.from_list(NUMBERED).to_iterable_dataset(num_shards=2)
    return set_.shuffle(seed=3, buffer_size=5)


def language_modelling():
    vocabulary = {"[PAD]": 0, **{f"word{i}": i for i in range(1, 61)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "word1")), pad_token="[PAD]"
    )
    return DataCollatorForLanguageModeling(tokenizer, mlm=False)


class Recorder(Trainer):
    """Which tokens it trains on in each step."""

    def training_step(self, model, inputs, *args):
        ids = inputs["input_ids"]
        self.tokens.setdefault(self.state.global_step, []).extend(ids[ids != 0].tolist())
        return super().training_step(model, inputs, *args)


def train_plainly(folder, model, data, collator=collate, resume=None, **options):
    """The tokens of each step, of Trainer alone."""
    args = arguments(folder, **options)
    trainer = Recorder(model=model, args=args, data_collator=collator, train_dataset=data)
    trainer.tokens = {}
    trainer.train(resume_from_checkpoint=resume)
    return trainer.tokens


def tokens_of(rows, by_id):
    """The same, by the rows."""
    tokens = {}
    for row in rows:
        tokens.setdefault(row["step"], []).extend(by_id[row["sample_id"]]["input_ids"])
    return tokens


WORKERS = {"dataloader_num_workers": 2}
FETCHED = {"accelerator_config": {"dispatch_batches": False}}
AS_IT_IS = {"remove_unused_columns": False}
BY_CONTENT, BY_NUMBER = {content_id(x): x for x in TRAIN}, {x["number"]: x for x in NUMBERED}
HUB_BY_CONTENT = {content_id(x): x for x in NUMBERED}


@pytest.mark.parametrize(
    ("make", "by_id", "collator", "options"),
    [
        (stream, BY_CONTENT, collate, {}),
        (stream, BY_CONTENT, language_modelling(), WORKERS),
        (stream, BY_CONTENT, DataCollatorWithFlattening(), AS_IT_IS),
        (hub_stream, HUB_BY_CONTENT, collate, {"gradient_accumulation_steps": 1}),
        (hub_stream, BY_NUMBER, collate, {**WORKERS, **FETCHED}),
    ],
    ids=["torch", "workers", "padding-free", "datasets", "datasets-column"],
)
def test_every_row_and_the_weights(tmp_path, close, make, by_id, collator, options):
    """An epoch may end in the midst of a step: what is left of it Trainer adds to the next epoch's first
    step, which then has its rows, too."""
    options = {"max_steps": 8 // options.get("gradient_accumulation_steps", 2) + 1, **options}
    model, regular = tiny_gpt2(), tiny_gpt2()
    column = "number" if by_id is BY_NUMBER else None
    models, rows = train(
        tmp_path / "scored", model, make(), collator=collator, id_column=column, **options
    )
    trained = train_plainly(tmp_path / "regular", regular, make(), collator, **options)
    for (name, p), q in zip(model.named_parameters(), regular.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6), name
    assert tokens_of(rows, by_id) == trained
    assert check_steps([*models, model.double()], rows, by_id, VAL, close) == len(trained)


def test_a_resumed_run_goes_by_the_same_ids(tmp_path):
    """Which are summed up over epochs, and over steps that a run repeats."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    _, whole = train(tmp_path / "whole", tiny_gpt2(), stream(), **options)
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    _, resumed = train(tmp_path / "whole", tiny_gpt2(), stream(), resume=checkpoint, **options)
    keys = lambda rows: [(row["step"], row["sample_id"]) for row in rows]
    assert keys(resumed) == keys(whole)
    for got, want in zip(resumed, whole, strict=True):
        assert got["dot"] == pytest.approx(want["dot"], rel=1e-4, abs=1e-6)
    # From the stream's beginning
    options["ignore_data_skip"] = True
    train(tmp_path / "whole", tiny_gpt2(), stream(), resume=checkpoint, **options)
    at = [
        [r["sample_id"] for r in rows_of(tmp_path / "whole" / "scores") if r["step"] == k]
        for k in range(4)
    ]
    assert at[2:] == at[:2]
    table = sample_table(tmp_path / "whole").to_pydict()
    assert sorted(table["sample_id"]) == sorted({*at[0], *at[1]}) and set(table["times"]) == {2}


class Picture:
    """What PIL's images have."""

    def __init__(self, mode, palette=None):
        self.mode, self.getpalette = mode, lambda: palette

    def __array__(self, dtype=None, copy=None):
        return np.zeros((2, 3), dtype=np.uint8)


TENSORS = {"input_ids": torch.tensor([3, 1]), "x": torch.tensor([1.5], dtype=torch.bfloat16)}
ITEMS = [
    {"input_ids": [3, 1], "labels": [3, 1]},
    {"input_ids": [3, 1], "labels": [-100, 1]},
    {"input_ids": [31], "labels": [3, 1]},
    {"input_ids": ["31"], "labels": [3, 1]},
    {"text": "3"},
    {"text": b"3"},
    {"text": 3},
    {"text": 3.0},
    {"text": None},
    {"text": datetime.datetime(2024, 1, 2, tzinfo=datetime.timezone.utc)},
    {"text": datetime.date(2024, 1, 2)},
    TENSORS,
    {**TENSORS, "x": TENSORS["x"][None]},
    {**TENSORS, "x": np.zeros(1)},
    {**TENSORS, "x": np.zeros(1, dtype=np.int64)},
    {"image": Picture("L")},
    {"image": Picture("P", [0, 0, 0])},
    {"image": Picture("P", [9, 9, 9])},
]


def test_items_have_an_id_by_what_they_hold():
    """Whatever the order of columns, and in every process: another number where anything differs."""
    ids = [content_id(item) for item in ITEMS]
    assert len(set(ids)) == len(ids) and all(0 <= i < 2**63 for i in ids)
    again = [dict(reversed(item.items())) for item in ITEMS]
    assert [content_id(BatchEncoding(item)) for item in again] == ids
    assert ids[0] == 96011700717053154, "ids of earlier runs are still to be found"
    for item, what in [
        ({"audio": object()}, "holds a object, of which .*; name an integer column"),
        ({"tags": {"a", "b"}}, "holds a set, of which .*; name an integer column"),
        ({("a", 1): 2}, "no sample_id: keys must be str"),
    ]:
        with pytest.raises(GraddotError, match=what):
            content_id(item)


def test_the_integers_of_a_column_alone_are_ids(tmp_path):
    own = ColumnId("n")
    values = [7, -1, np.int32(7), torch.tensor(7), 2**63 - 1]
    assert [own({"n": value}) for value in values] == [7, -1, 7, 7, 2**63 - 1]
    for wrong in ("7", 7.0, True, None, [7], torch.tensor([7]), 2**63, np.uint64(2**63), 2**70):
        with pytest.raises(GraddotError, match="id_column is 'n', where .* expected an integer"):
            own({"n": wrong})
    with pytest.raises(GraddotError, match="id_column is 'n', but an item .* has input_ids"):
        train(tmp_path, tiny_gpt2(), stream(), id_column="n")
    with pytest.raises(GraddotError, match="id_column and a training set whose samples have an"):
        train(tmp_path, tiny_gpt2(), TRAIN, id_column="number")
