"""`graddot train-tokenizer`."""

import gzip
import os

import pytest
from graddot_lm.errors import GraddotError
from graddot_lm.text.train_tokenizer import add_bpe_arguments, run_bpe, train_bpe
from tokenize_checks import GOOD, jsonl, parse_options
from tokenizers import Tokenizer


def test_train_bpe_round_trips_any_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(range(50)))
    out = tmp_path / "new" / "tokenizer.json"
    args = parse_options(add_bpe_arguments, input=tmp_path / "a.jsonl", output=out, vocab_size=300)
    assert run_bpe(args) == 0
    tokenizer = Tokenizer.from_file(str(out))
    assert tokenizer.get_vocab_size() == 300 and tokenizer.token_to_id("<|endoftext|>") == 0
    for text in ("  two spaces\n\ttab", "漢字 🙂 \x00", "unseen Ωmega"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_link_stays_one(tmp_path):
    """As /dev/stdout is one."""
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "link").symlink_to(tmp_path / "t.json")
    for _ in range(2):
        train_bpe([str(tmp_path / "a.jsonl")], 300, tmp_path / "link")
        assert (tmp_path / "link").is_symlink() and (tmp_path / "t.json").stat().st_size > 0


def test_closing_lines(tmp_path, capsys):
    source, out = tmp_path / "a.jsonl", tmp_path / "t.json"
    source.write_bytes(GOOD + b"\n{}\n" + GOOD)
    damaged = tmp_path / "b.jsonl.gz"
    damaged.write_bytes(gzip.compress(GOOD)[:-1])
    given = {"input": [source, damaged], "output": out, "skip_bad_lines": True}
    assert run_bpe(parse_options(add_bpe_arguments, **given, vocab_size=5000)) == 0
    size = f"{Tokenizer.from_file(str(out)).get_vocab_size()} tokens of the 5,000 asked for"
    assert capsys.readouterr().out.splitlines() == [
        f"{out}: {size}: the text has nothing left to merge, 1 bad line skipped",
        f"{damaged}: all from line 1 on is lost: truncated .gz stream; fetch the file again",
    ]
    assert run_bpe(parse_options(add_bpe_arguments, **given, vocab_size=260)) == 0
    assert capsys.readouterr().out.startswith(f"{out}: 260 tokens, 1 bad line skipped\n")


def test_train_bpe_errors(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"\n{}\n")
    with pytest.raises(GraddotError, match="at least 257"):
        train_bpe([str(tmp_path / "a.jsonl")], 256, tmp_path / "t.json")
    with pytest.raises(GraddotError, match=r"a\.jsonl:2: 'text' is missing"):
        train_bpe([str(tmp_path / "a.jsonl")], 300, tmp_path / "t.json")
    with pytest.raises(GraddotError, match="--output .*: is a folder; name a file, as .*/t"):
        train_bpe([str(tmp_path / "a.jsonl")], 300, tmp_path)
    with pytest.raises(
        GraddotError, match="--vocab_size 1000000000000: must be at most 10,000,000"
    ):
        train_bpe([str(tmp_path / "a.jsonl")], 10**12, tmp_path / "t.json")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(GraddotError, match="--output .*pipe: is no file that can be replaced"):
        train_bpe([str(tmp_path / "a.jsonl")], 300, tmp_path / "pipe")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(GraddotError, match=r"no document in .*/empty\.jsonl$"):
        train_bpe([str(tmp_path / "empty.jsonl")], 300, tmp_path / "t.json")
    assert not (tmp_path / "t.json").exists()
    for source in (tmp_path, tmp_path / "a.jsonl"):
        with pytest.raises(GraddotError, match="--output .*a.jsonl: is the input"):
            train_bpe([str(source)], 300, tmp_path / "a.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes().startswith(GOOD)
