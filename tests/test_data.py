"""Blocks, labels and sample_ids against the files read whole; sampling orders against counting."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from graddot_lm.errors import GraddotError
from graddot_lm.text.data import (
    MixtureSampler,
    TokenData,
    fixed_batch,
    parse_weights,
    permute,
    separated,
)
from graddot_lm.text.load_tokenizer import tokenizer_sha256
from graddot_lm.text.token_writer import FORMAT_VERSION
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

VOCAB = 300
TOKENS = {  # by domain: train and val tokens; at block size 8 these are 5, 0, 12, 2 train blocks
    "code": (41, 9),
    "tiny": (8, 0),
    "math": (104, 40),
    "web page": (17, 17),
}
BLOCKS = {"code": 5, "tiny": 0, "math": 12, "web page": 2}


def write(root: Path, tokens=TOKENS, dtype="<u2", **changes) -> dict[str, dict[str, np.ndarray]]:
    """A folder as `graddot tokenize` leaves it, of random tokens; returns them."""
    rng = np.random.default_rng(1)
    made: dict[str, dict[str, np.ndarray]] = {}
    domains = []
    for name, counts in tokens.items():
        slug = name.replace(" ", "-")
        (root / slug).mkdir(parents=True)
        made[name] = {}
        domain = {"name": name, "slug": slug}
        for split, count in zip(("train", "val"), counts, strict=True):
            made[name][split] = rng.integers(0, VOCAB, count)
            made[name][split].astype(dtype).tofile(root / slug / f"{split}.bin")
            domain[split] = {"tokens": count, "documents": 1}
        domains.append(domain)
    meta = {
        "format_version": FORMAT_VERSION,
        "dtype": {"<u2": "uint16", "<u4": "uint32"}[dtype],
        "vocab_size": VOCAB,
        "eot_token_id": 0,
        "tokenizer": {"name": "test", "sha256": "0" * 64},
        "seed": 0,
        "val_fraction": 0.1,
        "domains": domains,
    }
    (root / "meta.json").write_text(json.dumps(meta | changes))
    return made


@pytest.fixture
def root(tmp_path) -> Path:
    write(tmp_path / "data")
    return tmp_path / "data"


# Blocks


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("block_size", [1, 7, 8, 40])
def test_blocks_cover_the_files_with_labels_one_further(tmp_path, dtype, split, block_size):
    made = write(tmp_path / "data", dtype=dtype)
    data = TokenData(tmp_path / "data", split, block_size=block_size)
    X, Y = data.get(range(len(data)))
    assert X.dtype == Y.dtype == torch.int64 and X.shape == Y.shape == (len(data), block_size)
    sample_id = 0
    for name, splits in made.items():
        tokens = splits[split]
        count = 0
        for offset in range(0, len(tokens), block_size):
            if offset + block_size >= len(tokens):  # the last label would be missing
                break
            assert X[sample_id].tolist() == tokens[offset : offset + block_size].tolist()
            assert Y[sample_id].tolist() == tokens[offset + 1 : offset + block_size + 1].tolist()
            assert data.domain_of([sample_id]) == [name]
            assert data.offset_of([sample_id]).tolist() == [offset]
            sample_id, count = sample_id + 1, count + 1
        assert data.blocks_per_domain[name] == count
    assert sample_id == len(data)


def test_sample_id_is_the_same_whatever_is_selected(root):
    everything = TokenData(root, block_size=8)
    some = TokenData(root, domains=["web page", "math"], block_size=8)
    assert everything.domains == list(TOKENS) and some.domains == ["math", "web page"]
    assert everything.blocks_per_domain == some.blocks_per_domain == BLOCKS
    assert len(everything) == 19 and len(some) == 14
    assert some.first_id("web page") == 17
    for ids in ([18, 0, 5], np.array([18, 0, 5]), torch.tensor([18, 0, 5])):
        assert some.domain_of(ids) == ["web page", "code", "math"]
        assert some.offset_of(ids).tolist() == [8, 0, 0]
        assert torch.equal(some.get(ids)[0], everything.get(ids)[0])
    assert some.token_ids(18).tolist() == everything.get([18])[0][0].tolist()
    X, Y = some.get([])
    assert X.shape == Y.shape == (0, 8)


def test_sample_id_out_of_range(root):
    data = TokenData(root, block_size=8)
    for wrong in (-1, 19):
        with pytest.raises(GraddotError, match=f"sample_id {wrong}: .* 0 to 18"):
            data.get([0, wrong])


def test_files_stay_on_disk(root):
    data = TokenData(root, block_size=8)
    kinds = [type(tokens) for tokens in data._tokens]
    assert kinds == [np.memmap] * 4
    assert not any(tokens.flags.writeable for tokens in data._tokens)


# What is wrong with a folder


def test_foreign_and_unfinished_folders(tmp_path, root):
    with pytest.raises(GraddotError, match="no token data here"):
        TokenData(tmp_path)
    (tmp_path / "progress.json").write_text("{}")
    with pytest.raises(GraddotError, match="not finished"):
        TokenData(tmp_path)
    for text in ("{", "[]", "{}"):
        (tmp_path / "meta.json").write_text(text)
        with pytest.raises(GraddotError, match="not the meta.json of token data"):
            TokenData(tmp_path)
    write(tmp_path / "whole")
    meta = json.loads((tmp_path / "whole" / "meta.json").read_text())
    domain = {**meta["domains"][0], "train": 7}
    for change in ({"domains": [domain]}, {"domains": 7}, {"vocab_size": "7"}, {"tokenizer": None}):
        (tmp_path / "meta.json").write_text(json.dumps(meta | change))
        with pytest.raises(GraddotError, match="not the meta.json of token data"):
            TokenData(tmp_path)
    write(tmp_path / "new", format_version=FORMAT_VERSION + 1)
    with pytest.raises(GraddotError, match=f"format version {FORMAT_VERSION + 1}"):
        TokenData(tmp_path / "new")


@pytest.mark.parametrize("size", [207, 206, 0, 209, 210])
def test_file_of_another_size(root, size):
    file = root / "math" / "train.bin"
    content = file.read_bytes()
    file.write_bytes((content + b"\0\0")[:size])
    with pytest.raises(GraddotError, match=f"math/train.bin: 208 bytes expected.* {size} found"):
        TokenData(root, domains=["code"])  # also of a domain that is not selected
    file.unlink()
    with pytest.raises(GraddotError, match="math/train.bin: missing.* 208 bytes"):
        TokenData(root)


def test_selection_errors(root):
    with pytest.raises(GraddotError, match="'prose': unknown.*'code', 'tiny', 'math', 'web page'"):
        TokenData(root, domains=["prose"], block_size=8)
    with pytest.raises(GraddotError, match="'tiny': .* too few tokens for one block of 8"):
        TokenData(root, domains=["code", "tiny"], block_size=8)
    with pytest.raises(GraddotError, match="split 'test'"):
        TokenData(root, "test")
    with pytest.raises(GraddotError, match="block size 0"):
        TokenData(root, block_size=0)


def test_vocabulary(root):
    tokens = np.fromfile(root / "math" / "train.bin", "<u2")
    tokens[16] = VOCAB  # the first input of block 2 and the last label of block 1
    tokens.tofile(root / "math" / "train.bin")
    data = TokenData(root, block_size=8)
    data.get([5, 8])
    for sample_id in (6, 7):
        with pytest.raises(GraddotError, match="domain 'math', token offset 16: token id 300"):
            data.get([0, sample_id])


def test_fingerprint(tmp_path, root):
    reference = TokenData(root).fingerprint
    shutil.copytree(root, tmp_path / "copy")
    assert TokenData(tmp_path / "copy", "val", block_size=5).fingerprint == reference
    write(tmp_path / "other", tokens=TOKENS | {"math": (105, 40)})
    write(tmp_path / "seed", seed=1)
    write(tmp_path / "tokenizer", tokenizer={"name": "test", "sha256": "1" * 64})
    for name in ("other", "seed", "tokenizer"):
        assert TokenData(tmp_path / name).fingerprint != reference


def test_check_tokenizer(tmp_path):
    for name in ("a", "b"):
        Tokenizer(models.WordLevel({name: 0}, unk_token=name)).save(str(tmp_path / f"{name}.json"))
    sha256 = tokenizer_sha256(Tokenizer.from_file(str(tmp_path / "a.json")))
    write(tmp_path / "data", tokenizer={"name": "a.json", "sha256": sha256})
    data = TokenData(tmp_path / "data")
    data.check_tokenizer(str(tmp_path / "a.json"))
    with pytest.raises(GraddotError, match="b.json: not the tokenizer"):
        data.check_tokenizer(str(tmp_path / "b.json"))


# The permutation


@given(n=st.integers(1, 3000), key=st.text(max_size=5))
@settings(max_examples=50, deadline=None)
def test_permutation_is_a_bijection(n, key):
    assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


@given(n=st.integers(1, 2**62), seed=st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_permutation_of_a_huge_range_stays_within_and_apart(n, seed):
    index = np.unique(np.random.default_rng(seed).integers(0, n, 200))
    out = permute(index, n, "key")
    assert out.min() >= 0 and out.max() < n and len(np.unique(out)) == len(index)
    # Each place depends on its index alone, whatever else is asked for.
    assert permute(index[-1:], n, "key")[0] == out[-1]


def test_permutation_is_the_same_on_every_machine():
    # From the definition, worked out once; a change would reorder runs that are resumed.
    expected = [
        355026550,
        354581687,
        41456217,
        36666926,
        790764777,
        711287323,
        680113723,
        557609236,
    ]
    assert permute(np.arange(8), 10**9, "0/all/0").tolist() == expected


@pytest.mark.parametrize("n", [2, 3, 5, 12])
def test_small_shuffles_are_even(n):
    # Where each index goes over 800 keys: chi-square with (n-1)**2 degrees of freedom. Its mean
    # is that number and its deviation sqrt(2 * that); 6 deviations do not happen by chance.
    keys = 800
    counts = np.zeros((n, n))
    for key in range(keys):
        counts[np.arange(n), permute(np.arange(n), n, str(key))] += 1
    chi2 = ((counts - keys / n) ** 2 / (keys / n)).sum()
    freedom = (n - 1) ** 2
    assert chi2 < freedom + 6 * np.sqrt(2 * freedom) + 3


def test_large_shuffle_leaves_no_trace_of_the_order():
    n = 100_000
    order = permute(np.arange(n), n, "x")
    for lag in (0, 1, 2, 317):  # correlation with the index, and between neighbours
        a, b = (np.arange(n), order) if lag == 0 else (order[:-lag], order[lag:])
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(n)
    assert (order == np.arange(n)).sum() < 10  # 1 expected


# Sampling


def draw(sampler: MixtureSampler, batches: int) -> list[int]:
    return np.concatenate([sampler.next_batch() for _ in range(batches)]).tolist()


def test_an_epoch_is_every_block_once(root):
    data = TokenData(root, domains=["code", "web page"], block_size=8)
    drawn = draw(MixtureSampler(data, batch_size=3, seed=0), 14)  # 6 epochs of 7 blocks
    epochs = [drawn[start : start + 7] for start in range(0, 42, 7)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4, 17, 18] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert draw(MixtureSampler(data, batch_size=3, seed=1), 14) != drawn
    # A batch larger than an epoch, and the same order in other portions.
    assert draw(MixtureSampler(data, batch_size=21, seed=0), 2) == drawn


def test_weights_decide_the_mixture(root):
    data = TokenData(root, block_size=8)
    weights = {"code": 3.0, "math": 1.0, "tiny": 0.0}
    batch = MixtureSampler(data, batch_size=4000, seed=0, weights=weights).next_batch()
    assert batch.dtype == np.int64
    names = np.array(data.domain_of(batch))
    share = (names == "code").mean()
    assert abs(share - 0.75) < 5 * np.sqrt(0.75 * 0.25 / 4000)
    assert set(names) == {"code", "math"}
    for name in ("code", "math"):  # each domain by its own epochs, without repeats within one
        own, blocks = batch[names == name], BLOCKS[name]
        for start in range(0, len(own) - blocks + 1, blocks):
            epoch = np.sort(own[start : start + blocks])
            assert np.array_equal(epoch, data.first_id(name) + np.arange(blocks))


@pytest.mark.parametrize("weights", [None, {"code": 2.0, "math": 0.5}], ids=["all", "weights"])
def test_state_goes_on_exactly(root, weights):
    data = TokenData(root, block_size=8)
    sampler = MixtureSampler(data, 5, seed=3, weights=weights)
    draw(sampler, 7)
    state = json.loads(json.dumps(sampler.state_dict()))
    expected = draw(sampler, 20)
    other = MixtureSampler(TokenData(root, block_size=8), 5, seed=3, weights=weights)
    other.load_state_dict(state)
    assert draw(other, 20) == expected
    again = MixtureSampler(data, 10, seed=3, weights=weights)
    again.load_state_dict(state)
    assert draw(again, 10) == expected


def test_state_of_another_run_is_refused(tmp_path, root):
    data = TokenData(root, block_size=8)
    state = MixtureSampler(data, 5, seed=3).state_dict()
    write(tmp_path / "other", seed=9)
    others = {
        "seed": MixtureSampler(data, 5, seed=4),
        "weights": MixtureSampler(data, 5, seed=3, weights={"code": 1}),
        "domains": MixtureSampler(TokenData(root, domains=["code"], block_size=8), 5, seed=3),
        "block_size": MixtureSampler(TokenData(root, block_size=4), 5, seed=3),
        "split": MixtureSampler(TokenData(root, "val", block_size=8), 5, seed=3),
        "data": MixtureSampler(TokenData(tmp_path / "other", block_size=8), 5, seed=3),
    }
    for name, sampler in others.items():
        with pytest.raises(GraddotError, match=f"saved sampler had {name} "):
            sampler.load_state_dict(state)


def test_sampler_errors(root):
    data = TokenData(root, domains=["code", "math"], block_size=8)
    cases: dict[str, dict[str, float]] = {
        "'web page' is unknown or not selected; known are 'code', 'math'": {"web page": 1},
        "code=-1: must be": {"code": -1},
        "code=nan: must be": {"code": float("nan")},
        "at least one must be above 0": {"code": 0},
        "their sum is too large": {"code": 1e308, "math": 1e308},
    }
    for message, weights in cases.items():
        with pytest.raises(GraddotError, match=message):
            MixtureSampler(data, 2, 0, weights)
    with pytest.raises(GraddotError, match="'tiny' has no block"):
        MixtureSampler(TokenData(root, block_size=8), 2, 0, {"tiny": 1})
    with pytest.raises(GraddotError, match="batch size 0"):
        MixtureSampler(data, 0, 0)
    with pytest.raises(GraddotError, match="no block of 1024 tokens in the train split"):
        MixtureSampler(TokenData(root), 2, 0)


def test_a_comma_or_double_quotes_in_a_name():
    assert separated('a, "b, c" ,d') == ["a", "b, c", "d"]
    assert separated('5" disks,"x') == ['5" disks', '"x']
    assert parse_weights('"b, c"=2,a=1') == {"b, c": 2.0, "a": 1.0}
    assert separated('"""Python"" docs",x,""""') == ['"Python" docs', "x", '"']
    assert parse_weights('"""b"", c"=2,a=1') == {'"b", c': 2.0, "a": 1.0}


def test_parse_weights():
    assert parse_weights("code=2, web page=0.5,a=b=1") == {"code": 2, "web page": 0.5, "a=b": 1}
    for text in ("", "code", "code=", "=1", "code=x", "code=-1", "code=inf", "code=1,"):
        with pytest.raises(GraddotError, match="must be like NAME=NUMBER"):
            parse_weights(text)
    with pytest.raises(GraddotError, match="'code' is named twice"):
        parse_weights("code=1,code=2")


def test_fixed_batch(root):
    data = TokenData(root, domains=["code", "web page"], block_size=8)
    batch = fixed_batch(data, 5, seed=0)
    assert batch.dtype == np.int64 and len(set(batch.tolist())) == 5
    assert set(batch.tolist()) <= {0, 1, 2, 3, 4, 17, 18}
    assert fixed_batch(data, 5, seed=0).tolist() == batch.tolist()
    assert sorted(fixed_batch(data, 7, seed=0).tolist()) == [0, 1, 2, 3, 4, 17, 18]
    assert len({tuple(fixed_batch(data, 5, seed)) for seed in range(5)}) > 1
    for n in (0, 8):
        with pytest.raises(GraddotError, match=f"a fixed batch of {n}: .* 7 blocks of 8"):
            fixed_batch(data, n, seed=0)
