"""The sequences that the report shows, the best and the worst, with their text out of a small data
folder; and why it shows none."""

import json

import numpy as np
import pytest
from graddot_lm.results import score_figures, score_text
from graddot_lm.results.excerpts import escape
from graddot_lm.text.data import TokenData
from graddot_lm.text.tokenization import FORMAT_VERSION
from reported_runs import DOMAINS, printed, write_run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers


@pytest.mark.parametrize("top, worst", [(2, [41]), (3, []), (1, [41])])
def test_of_few_samples_none_is_both_best_and_worst(tmp_path, top, worst):
    run = write_run(tmp_path / "run", data_rows())
    summary = score_figures.summarize(run, top)
    assert [row["sample_id"] for row in summary["best"]] == [0, 31, 41][:top]
    assert [row["sample_id"] for row in summary["worst"]] == worst
    none = "worst sequences: there are no others" in score_text.format_summary(summary)
    assert none == (not worst)


TEXTS = ["x = 1\n\x1b[31mred\\\n", "∑ ü 数 " * 20, "plain words "]


@pytest.fixture
def data_dir(tmp_path):
    """Three domains of 20 blocks of 128 tokens, a token a byte; each repeats its text."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(alphabet))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    root = tmp_path / "data"
    domains = []
    for name, text in zip(DOMAINS, TEXTS, strict=True):
        slug = name.replace("\n", "-")
        (root / slug).mkdir(parents=True)
        tokens = np.resize(tokenizer.encode(text).ids, 20 * 128 + 1)
        tokens.astype("<u2").tofile(root / slug / "train.bin")
        (root / slug / "val.bin").touch()
        counts = {"tokens": len(tokens), "documents": 1}
        none = {"tokens": 0, "documents": 0}
        domains.append({"name": name, "slug": slug, "train": counts, "val": none})
    meta = {"format_version": FORMAT_VERSION, "dtype": "uint16", "vocab_size": 256}
    meta |= {"tokenizer": {"name": "bytes", "sha256": ""}, "eot_token_id": 0}
    meta |= {"seed": 0, "val_fraction": 0.0}
    (root / "meta.json").write_text(json.dumps({**meta, "domains": domains}))
    tokenizer.save(str(root / "tokenizer.json"))
    return root


def data_rows() -> dict[str, np.ndarray]:
    """One step with block 0 of code, 11 of math and 1 of the last domain."""
    ids, value = np.array([0, 31, 41]), np.array([3.0, 2.0, 1.0])
    rows = {"step": np.ones(3, int), "sample_id": ids, "offset": ids % 20 * 128}
    return {**rows, "dot": value, "value": value}


def test_excerpts_are_the_samples_text_on_one_line(tmp_path, data_dir):
    config = {"data_dir": str(data_dir), "tokenizer": "no/such.json", "block_size": 128}
    path = write_run(tmp_path / "run", data_rows(), config)
    summary = score_figures.summarize(path)
    assert summary["no_excerpts"] is None
    code, math, web = (row["excerpt"] for row in summary["best"])
    assert code.startswith("x = 1\\n\\x1b[31mred\\\\\\nx = 1") and len(code) <= 80
    assert math.startswith("∑ ü 数 ∑ ü 数 ") and len(math) <= 80
    assert web == ("plain words " * 11)[128 % 12 :][:79] + "…"
    assert web in printed(path) and "\x1b" not in printed(path)


def test_no_excerpts_of_text_that_was_tokenized_anew(tmp_path, data_dir):
    """Samples of the only domain lie where they did, whatever text is there now."""
    meta = json.loads((data_dir / "meta.json").read_text())
    config = {"data_dir": str(data_dir), "block_size": 128}
    config["data_fingerprint"] = TokenData(data_dir).fingerprint
    path = write_run(tmp_path / "run", data_rows(), config)
    assert score_figures.summarize(path)["best"][0]["excerpt"].startswith("x = 1")
    (data_dir / "meta.json").write_text(json.dumps(meta | {"seed": 1}))
    summary = score_figures.summarize(path)
    assert "excerpt" not in summary["best"][0]
    assert summary["no_excerpts"].endswith("not the data of this run")


def test_no_excerpts_of_other_text_of_as_many_tokens(tmp_path, data_dir):
    """As made texts of equal length are, when they are made anew."""
    data = TokenData(data_dir)
    config = {"data_dir": str(data_dir), "block_size": 128, "data_fingerprint": data.fingerprint}
    config["data_content"] = [data.content, TokenData(data_dir, "val").content]
    path = write_run(tmp_path / "run", data_rows(), config)
    assert score_figures.summarize(path)["best"][0]["excerpt"].startswith("x = 1")
    file = data_dir / "code" / "train.bin"
    file.write_bytes(file.read_bytes()[::-1])
    summary = score_figures.summarize(path)
    assert "excerpt" not in summary["best"][0]
    assert summary["no_excerpts"].endswith("not the data of this run")


def test_the_named_tokenizer_serves_if_the_data_folder_has_none(tmp_path, data_dir):
    (data_dir / "tokenizer.json").rename(tmp_path / "t.json")
    config = {"data_dir": str(data_dir), "tokenizer": str(tmp_path / "t.json"), "block_size": 128}
    summary = score_figures.summarize(write_run(tmp_path / "run", data_rows(), config))
    assert summary["best"][1]["excerpt"].startswith("∑ ü 数")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"block_size": None}, "config.json names no block_size"),
        ({"data_dir": "/no/such/data"}, "/no/such/data/meta.json: missing"),
        ({"block_size": 64}, "sample 31 is elsewhere; not the data of this run"),
        ({"tokenizer": None}, "config.json names no tokenizer"),
        ({"tokenizer": "/no/such.json"}, "/no/such.json: no such tokenizer file"),
    ],
)
def test_without_excerpts_the_reason_is_shown(tmp_path, data_dir, change, words):
    (data_dir / "tokenizer.json").rename(tmp_path / "t.json")
    config = {"data_dir": str(data_dir), "tokenizer": str(tmp_path / "t.json"), "block_size": 128}
    config = {k: v for k, v in {**config, **change}.items() if v is not None}
    text = printed(write_run(tmp_path / "run", data_rows(), config))
    assert f"no text shown: {words}" in text.replace(f"{data_dir}: ", "")
    assert "best sequences" in text


def test_the_data_folder_of_these_tests_is_read_as_any_other(data_dir):
    assert len(TokenData(data_dir, block_size=128)) == 60


@pytest.mark.parametrize(
    "text, shown",
    [
        ("short", "short"),
        ("12345678", "12345678"),
        ("123456789", "1234567…"),
        ("1234567\n9", "1234567…"),
        ("a\tb\u202ec", "a\\tb…"),
        ("\ud800", "\\ud800"),
        ("", ""),
    ],
)
def test_escaping_never_cuts_an_escape_open(text, shown):
    assert escape(text, 8) == shown
