import json
import pickle
import shutil

import numpy as np
import pytest
from absl import flags

from olmoe_jax.data import layout, pipeline
from olmoe_jax.data import tokenizer as tokenizer_lib

BATCH = 5


def _batches(prepared, **arguments):
    return pipeline.Batches(prepared.data, **({"batch_size": BATCH, "seed": 3} | arguments))


def _equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def test_a_batch_has_the_shapes_and_types_that_training_expects(prepared):
    batch = _batches(prepared).batch(2)
    types = {k: (v.shape, str(v.dtype)) for k, v in batch.items()}
    shape = (BATCH, 23)
    assert types == {
        "tokens": (shape, "int32"),
        "documents": (shape, "int32"),
        "domains": (shape, "uint8"),
        "token_mask": (shape, "bool"),
        "loss_mask": (shape, "bool"),
    }


def test_every_epoch_sees_every_window_once_in_another_order(prepared):
    batches = _batches(prepared)
    count = prepared.data.num_windows("train")
    assert count % BATCH  # a batch that spans two epochs
    steps = -(-3 * count // BATCH)
    order = [index for step in range(steps) for index in batches.indices(step)]
    epochs = [order[e * count : (e + 1) * count] for e in range(3)]
    assert [sorted(e) for e in epochs] == [list(range(count))] * 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != list(range(count))


def test_the_order_follows_the_seed_alone(prepared):
    batches = _batches(prepared)
    assert [_batches(prepared).indices(s) for s in (7, 0)] == [batches.indices(s) for s in (7, 0)]
    assert _batches(prepared, seed=4).indices(0) != batches.indices(0)
    assert _batches(prepared, start_step=9).indices(2) == batches.indices(11)


def test_a_batch_is_the_windows_of_its_indices(prepared):
    batches = _batches(prepared)
    windows = prepared.data.read_windows("train", batches.indices(6))
    batch = batches.batch(6)
    assert all(np.array_equal(batch[k], windows[k]) for k in windows)
    everything = prepared.data.read_windows("train", range(prepared.data.num_windows("train")))
    assert np.array_equal(batch["tokens"], everything["tokens"][batches.indices(6)])


@pytest.mark.parametrize("cuts", [(0, 5), (0, 2, 5), (0, 1, 2, 3, 4, 5)])
def test_the_rows_of_all_processes_make_up_the_batch(prepared, cuts):
    parts = [
        _batches(prepared, rows=slice(a, b)).batch(30) for a, b in zip(cuts, cuts[1:], strict=False)
    ]
    joined = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
    assert _equal(joined, _batches(prepared).batch(30))


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_ahead_gives_the_same_batches_from_any_step(prepared, workers):
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain's worker processes want it
    batches = _batches(prepared, workers=workers)
    for first in (0, 31):
        iterator = batches.iterate(first)
        for step in range(first, first + 9):
            assert _equal(next(iterator), _batches(prepared).batch(step))
        iterator.close()


def test_only_real_tokens_are_in_the_masks(prepared):
    last = prepared.data.num_windows("train") - 1
    batch = pipeline.as_batch(prepared.data.read_windows("train", [0, last]))
    missing = -prepared.data.info.splits["train"].tokens % 23
    assert missing
    assert batch["token_mask"].tolist() == [
        [True] * 23,
        [True] * (23 - missing) + [False] * missing,
    ]
    assert np.array_equal(batch["loss_mask"], batch["token_mask"])


def _repeats(row, max_ngram, max_repeats):
    """The definition, by counting."""
    for n in range(1, max_ngram + 1):
        for start in range(len(row)):
            gram, times = row[start : start + n], 1
            while len(gram) == n and row[start + times * n : start + (times + 1) * n] == gram:
                times += 1
            if times >= max_repeats:
                return True
    return False


def test_repetitive_windows_are_those_that_counting_finds():
    rng = np.random.default_rng(3)
    rows = rng.integers(0, 2, (300, 31))
    found = pipeline.repetitive(rows, np.ones(rows.shape, bool), max_ngram=3, max_repeats=5)
    expected = [_repeats(row.tolist(), 3, 5) for row in rows]
    assert found.tolist() == expected
    assert 30 < sum(expected) < 270


@pytest.mark.parametrize("ngram", [1, 5, 13])
def test_the_filter_begins_at_32_repeats_of_up_to_13_tokens(ngram):
    rng = np.random.default_rng(ngram)
    gram = rng.permutation(100)[:ngram]
    for repeats, masked in ((31, False), (32, True)):
        row = rng.integers(200, 10**6, 512)
        row[37 : 37 + ngram * repeats] = np.tile(gram, repeats)
        mask = np.ones((1, 512), bool)
        assert pipeline.repetitive(row[None], mask).tolist() == [masked]
    gram = np.arange(14)
    row[: 14 * 33] = np.tile(gram, 33)
    row[14 * 33 :] = np.arange(1000, 1000 + 512 - 14 * 33)
    assert pipeline.repetitive(row[None], mask).tolist() == [False]


def test_padding_is_no_repetition_and_a_masked_window_keeps_its_tokens():
    windows = {
        "tokens": np.array([[*range(1, 8), *[0] * 93], [5] * 100]),
        "documents": np.array([[0] * 7 + [-1] * 93, [1] * 100]),
        "domains": np.zeros((2, 100), np.uint8),
    }
    batch = pipeline.as_batch(windows, mask_repetitive=True)
    assert batch["loss_mask"].sum(axis=1).tolist() == [7, 0]
    assert batch["token_mask"].sum(axis=1).tolist() == [7, 100]
    assert pipeline.as_batch(windows)["loss_mask"].sum(axis=1).tolist() == [7, 100]


@pytest.mark.parametrize("num_windows", [0, 3, 7, 1000])
def test_validation_windows_are_fixed_spread_and_padded(prepared, num_windows):
    data = prepared.data
    available = data.num_windows("validation")
    assert available > 7
    found = pipeline.validation_batches(data, num_windows=num_windows, batch_size=4)
    again = pipeline.validation_batches(data, num_windows=num_windows, batch_size=4)
    assert all(_equal(a, b) for a, b in zip(found, again, strict=True))
    count = min(num_windows or available, available)
    assert len(found) == -(-count // 4)
    assert {b["tokens"].shape for b in found} == {(4, 23)}
    tokens = np.concatenate([b["tokens"] for b in found])
    real = np.concatenate([b["token_mask"].any(axis=1) for b in found])
    assert real.tolist() == [True] * count + [False] * (len(real) - count)
    everything = data.read_windows("validation", range(available))["tokens"]
    places = [int(np.flatnonzero((everything == row).all(axis=1))[0]) for row in tokens[:count]]
    assert places[0] == 0 and sorted(set(places)) == places
    assert places[-1] >= available - available / count - 1
    gaps = np.diff(places)
    assert not len(gaps) or gaps.max() - gaps.min() <= 1


def test_data_pickles_as_its_path(prepared):
    data = prepared.data
    data.read_windows("train", [0])
    found = pickle.loads(pickle.dumps(data))
    assert found.info == data.info
    assert np.array_equal(
        found.read_windows("train", [3])["tokens"], data.read_windows("train", [3])["tokens"]
    )


@pytest.fixture
def copy(prepared, tmp_path):
    """A copy of the prepared directory, to be damaged."""
    return shutil.copytree(prepared.path, tmp_path / "copy")


def test_another_tokenizer_or_length_than_named_is_refused(prepared, copy, tmp_path):
    assert pipeline.open(copy, tokenizer=prepared.tokenizer_file, sequence_length=23).info
    other = tokenizer_lib.train(["other text"], vocab_size=259)
    (tmp_path / "other.json").write_bytes(other.json)
    hashes = rf"{prepared.tokenizer.sha256}.*{other.sha256}"
    with pytest.raises(ValueError, match=rf"copy: made with another tokenizer .*{hashes}"):
        pipeline.open(copy, tokenizer=tmp_path / "other.json")
    with pytest.raises(ValueError, match="windows of 23 tokens; config.data.sequence_length is 29"):
        pipeline.open(copy, sequence_length=29)


@pytest.mark.parametrize(
    "name", ["documents.jsonl", "unigram_counts.npy", "tokenizer.json", "dataset"]
)
@pytest.mark.parametrize("missing", [True, False])
def test_incomplete_data_is_refused(copy, name, missing):
    path = copy / name
    if path.is_dir():
        path = next(path.rglob("*train*"))
    if missing:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    expected = "is missing" if missing else "instead of"
    with pytest.raises(ValueError, match=rf"{path.name} .*{expected}.*run prepare_data again"):
        pipeline.open(copy)


def test_what_is_no_prepared_data_is_named(copy, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such directory"):
        pipeline.open(tmp_path / "nowhere")
    info = json.loads((copy / layout.INFO).read_text())
    (copy / layout.INFO).write_text(json.dumps(info | {"format": 99}))
    with pytest.raises(ValueError, match="format 99, this version reads 1"):
        pipeline.open(copy)
    (copy / layout.INFO).write_text("{")
    with pytest.raises(ValueError, match="info.json: damaged"):
        pipeline.open(copy)
    (copy / layout.INFO).unlink()
    with pytest.raises(FileNotFoundError, match="not prepared data, or not completely"):
        pipeline.open(copy)


def test_documents_are_found_by_number_and_others_refused(prepared):
    data = prepared.data
    assert [data.document(n).id for n in (130, 0, 7)] == ["code-130", "wiki-0", "code-7"]
    for number in (-1, 131):
        with pytest.raises(ValueError, match=f"no document {number}"):
            data.document(number)
