"""`graddot tokenize` against a plain one-document-at-a-time encoding, and its tokenizers."""

import json
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from graddot_lm.errors import GraddotError
from graddot_lm.text import text_source, token_writer, tokenization
from graddot_lm.text.load_tokenizer import load_tokenizer
from tokenize_checks import (
    DOMAINS,
    content,
    document,
    documents_in,
    small_bpe,
    small_pile,
    tokenize,
)
from tokenizers import Tokenizer, models, pre_tokenizers


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> Path:
    return small_bpe(tmp_path_factory.mktemp("bpe"))


@pytest.fixture
def pile(tmp_path) -> Path:
    return small_pile(tmp_path / "pile")


def test_every_document_in_order_once(tmp_path, pile, bpe):
    meta = tokenize(pile, tmp_path / "out", bpe, val_fraction=0.2)
    assert [d["name"] for d in meta["domains"]] == DOMAINS
    assert [d["slug"] for d in meta["domains"]] == ["pile-cc", "wikipedia-en", "github"]
    assert meta["dtype"] == "uint16" and meta["eot_token_id"] == 0 and meta["bad_lines"] == 0
    assert [Path(s["name"]).name for s in meta["sources"]] == [
        "a.jsonl",
        "b.jsonl.gz",
        "c.jsonl.zst",
    ]
    held_out = 0
    for index, domain in enumerate(meta["domains"]):
        expected = [document(n)["text"] for n in range(index, 300, 3)]
        found = {}
        for split in ("train", "val"):
            path = tmp_path / "out" / domain["slug"] / f"{split}.bin"
            found[split] = documents_in(path, bpe)
            assert domain[split]["documents"] == len(found[split])
            assert domain[split]["tokens"] * 2 == path.stat().st_size
        held_out += len(found["val"])
        # Texts are different, so both splits merge into one order.
        rest = {split: iter([*texts, None]) for split, texts in found.items()}
        heads = {split: next(texts) for split, texts in rest.items()}
        for text in expected:
            split = "train" if heads["train"] == text else "val"
            assert heads[split] == text
            heads[split] = next(rest[split])
        assert heads == {"train": None, "val": None}
    assert 30 <= held_out <= 90  # 300 documents at 0.2: 60, give or take over 4 sigma
    assert not list((tmp_path / "out").glob("progress*"))


def test_result_depends_on_seed_but_not_on_workers_or_cuts(tmp_path, pile, bpe, monkeypatch):
    tokenize(pile, tmp_path / "one", bpe, workers=1)
    tokenize(pile, tmp_path / "other", bpe, workers=2, seed=1, val_fraction=0.3)
    monkeypatch.setattr(text_source, "CHUNK_BYTES", 500)
    monkeypatch.setattr(token_writer, "COMMIT_SECONDS", 0)
    monkeypatch.setattr(text_source, "READ_BYTES", 77)
    tokenize(pile, tmp_path / "three", bpe, workers=3)
    assert content(tmp_path / "one") == content(tmp_path / "three")
    assert content(tmp_path / "one") != content(tmp_path / "other")


def test_no_more_workers_than_cpus(tmp_path, pile, bpe, monkeypatch):
    started = []

    def pool(workers, *arguments):
        started.append(workers)
        return ProcessPoolExecutor(2, *arguments)

    monkeypatch.setattr(tokenization, "ProcessPoolExecutor", pool)
    tokenize(pile, tmp_path / "out", bpe, workers=10**30)
    assert started == [os.cpu_count()]


def test_max_tokens_is_exact_and_a_prefix(tmp_path, pile, bpe):
    tokenize(pile, tmp_path / "all", bpe)
    whole = content(tmp_path / "all")
    for limit in (1, 777, 2000):
        meta = tokenize(pile, tmp_path / f"cut{limit}", bpe, max_tokens=limit)
        counts = [d[split]["tokens"] for d in meta["domains"] for split in ("train", "val")]
        assert sum(counts) == limit
        for name, data in content(tmp_path / f"cut{limit}").items():
            assert whole[name].startswith(data[:-2])  # all but the eot of a cut document


def test_uint32_above_65536(tmp_path):
    vocabulary = {f"w{n}": n for n in range(70_000)} | {"<|endoftext|>": 70_000}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.jsonl").write_text('{"text": "w69999 w5 w65536"}\n')
    meta = tokenize(
        tmp_path / "a.jsonl", tmp_path / "out", tmp_path / "tokenizer.json", default_domain="x"
    )
    assert meta["dtype"] == "uint32" and meta["vocab_size"] == 70_001
    tokens = np.concatenate([np.fromfile(p, "<u4") for p in (tmp_path / "out").rglob("*.bin")])
    assert tokens.tolist() == [69999, 5, 65536, 70_000]


def test_special_token_in_text_does_not_end_a_document(tmp_path, bpe):
    text = "before <|endoftext|> after"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\n")
    tokenize(tmp_path / "a.jsonl", tmp_path / "out", bpe, default_domain="x", val_fraction=0)
    assert documents_in(tmp_path / "out" / "x" / "train.bin", bpe) == [text]


def test_columns_slugs_and_empty_lines(tmp_path, bpe):
    lines = [
        {"a": {"b": "one"}, "kind": "A b"},
        {"a": {"b": "two"}, "kind": "a-B"},
        {"a.b": "three", "kind": "漢"},
        {"a": {"b": ""}},
    ]
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(line) for line in lines))
    given = {"text_column": "a.b", "domain_column": "kind", "default_domain": "rest"}
    meta = tokenize(tmp_path / "a.jsonl", tmp_path / "out", bpe, val_fraction=0, **given)
    slugs = {d["name"]: d["slug"] for d in meta["domains"]}
    assert slugs == {"A b": "a-b", "a-B": "a-b-2", "漢": "domain", "rest": "rest"}
    found = {
        slug: documents_in(tmp_path / "out" / slug / "train.bin", bpe) for slug in slugs.values()
    }
    assert found == {"a-b": ["one"], "a-b-2": ["two"], "domain": ["three"], "rest": [""]}


def test_a_domain_of_any_name_has_a_folder(tmp_path, bpe):
    names = [
        "lock",
        "writer.lock",
        "progress.json",
        "meta.json",
        "..",
        "/",
        ".tmp-",
        "a/b",
        "x" * 999,
    ]
    lines = [json.dumps({"text": name, "domain": name}) for name in names]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    given = {"domain_column": "domain", "val_fraction": 0}
    meta = tokenize(tmp_path / "a.jsonl", tmp_path / "out", bpe, **given)
    for name, domain in zip(names, meta["domains"], strict=True):
        assert domain["name"] == name
        assert documents_in(tmp_path / "out" / domain["slug"] / "train.bin", bpe) == [name]


def test_each_domain_is_reported_on_one_line(tmp_path, bpe, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "", "meta": {"pile_set_name": "a\\nb\\u001b[1m"}}')
    meta = tokenize(tmp_path / "a.jsonl", tmp_path / "out", bpe, val_fraction=0)
    assert meta["domains"][0]["name"] == "a\nb\x1b[1m"
    lines = ["a\\nb\\x1b[1m: 1 train and 0 val tokens", f"{tmp_path}/out: 1 tokens"]
    assert capsys.readouterr().out.splitlines() == lines


@pytest.mark.parametrize(
    "option",
    [{"val_fraction": 1}, {"max_tokens": 0}, {"workers": 0}, {"default_domain": ""}],
    ids=str,
)
def test_option_out_of_range(tmp_path, pile, bpe, option):
    with pytest.raises(GraddotError, match=f"--{next(iter(option))}"):
        tokenize(pile, tmp_path / "out", bpe, **option)


def test_tokenizer_errors(tmp_path, pile, bpe, monkeypatch):
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(GraddotError, match="not a tokenizer.json"):
        tokenize(pile, tmp_path / "out", tmp_path / "broken.json")
    with pytest.raises(GraddotError, match="no such tokenizer file"):
        tokenize(pile, tmp_path / "out", tmp_path / "missing.json")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(GraddotError, match="'gpt2' could not be had.*local tokenizer.json"):
        tokenize(pile, tmp_path / "out", "gpt2")
    with pytest.raises(GraddotError, match="no token '</s>'"):
        tokenize(pile, tmp_path / "out", bpe, eot_token="</s>")


def test_text_that_the_tokenizer_has_no_tokens_for(tmp_path, pile):
    tokenizer = Tokenizer(models.WordLevel({"Document": 0, "<|endoftext|>": 1}))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(
        GraddotError, match="a.jsonl: the tokenizer cannot encode all of lines 1 to"
    ):
        tokenize(pile, tmp_path / "out", tmp_path / "tokenizer.json")


def test_an_unreachable_hub_is_asked_once_then_the_cache(bpe, monkeypatch):
    asked = []

    def ask(url, timeout):
        asked.append(timeout)
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", ask)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: cached)
    cached = None
    with pytest.raises(GraddotError, match="'some/name' could not.*no route to the hub"):
        load_tokenizer("some/name")
    cached = str(bpe)
    assert load_tokenizer("some/name").to_str() == Tokenizer.from_file(cached).to_str()
    assert len(asked) == 2 and max(asked) <= 10


def test_eos_of_a_tokenizer_folder(tmp_path, pile):
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    folder = tmp_path / "tok"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(GraddotError, match="--eot_token"):
        tokenize(pile, tmp_path / "out", folder / "tokenizer.json")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert tokenize(pile, tmp_path / "out", folder)["eot_token_id"] == 1
