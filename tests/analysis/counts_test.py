import collections
import dataclasses
import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from olmoe_jax.analysis import counting, counts_files, trace, trace_files
from olmoe_jax.analysis import counts as counts_lib
from tests.analysis import synthetic


def slow_counts(source, folds):
    """Everything that Counts holds, as Counters, one token at a time."""
    block = source.tokens
    found = collections.defaultdict(collections.Counter)
    for t in range(len(block)):
        document = int(block.documents[t])
        group, fold = document % counts_lib.GROUPS, document % folds
        found["group_tokens"][group] += 1
        words = {"input": block.input_ids, "predicted": block.predicted_ids, "next": block.next_ids}
        words = {kind: int(ids[t]) for kind, ids in words.items() if ids[t] >= 0}
        for kind, word in words.items():
            found["occurrences", kind][word, fold] += 1
        firsts = {}
        for layer in range(block.expert_ids.shape[1]):
            ids = [int(e) for e in block.expert_ids[t, layer] if e >= 0]
            weights = block.weights[t, layer, : len(ids)].astype(float)
            found["weights"][group, layer, 0] += weights.sum()
            found["weights"][group, layer, 1] += weights[0] if ids else 0
            found["weights"][group, layer, 2] += np.log(weights[0] / weights[-1]) if ids else 0
            for rank, chosen in (("topk", ids), ("top1", ids[:1])):
                for e in chosen:
                    found[f"group_{rank}"][group, layer, e] += 1
                    for kind, word in words.items():
                        found[kind, rank][layer, word, e, fold] += 1
            for a, b in itertools.product(ids, ids):
                found["pairs"][fold, layer, a, b] += 1
            for a, b in itertools.pairwise(ids):
                found["adjacent"][fold, layer, a, b] += 1
            if ids:
                firsts[layer] = ids[0]
        for path, (one, two) in enumerate(counts_lib.default_paths(block.expert_ids.shape[1])):
            if one in firsts and two in firsts:
                found["paths"][fold, path, firsts[one], firsts[two]] += 1
    return found


def as_counter(array):
    return {tuple(map(int, i)): array[tuple(i)] for i in np.argwhere(array)}


@pytest.mark.parametrize("missing, k, size", [(0.0, 3, 137), (0.3, 3, 137), (0.1, 5, 900)])
def test_counts_are_those_of_a_loop_over_tokens(missing, k, size, monkeypatch):
    monkeypatch.setattr(counting, "_TOKENS", 400)
    monkeypatch.setattr(counting, "_KEYS", 100)  # of the pairs of some 16 tokens
    source = synthetic.make_trace(
        layers=(0, 2, 3, 5), missing=missing, documents=1203, tokens=900, k=k
    )
    counts = counting.count(source, size=size, folds=3)
    want = slow_counts(source, 3)
    for name in ("group_topk", "group_top1", "pairs", "adjacent", "paths"):
        assert as_counter(getattr(counts, name)) == dict(want[name]), name
    assert counts.path_layers == ((0, 1), (1, 2), (2, 3), (1, 3))
    assert as_counter(counts.group_tokens) == {(g,): n for g, n in want["group_tokens"].items()}
    np.testing.assert_array_equal(counts.topk, counts.group_topk.sum(0))
    np.testing.assert_array_equal(counts.top1, counts.group_top1.sum(0))
    weights = np.zeros(counts.group_weights.shape)
    for place, value in want["weights"].items():
        weights[place] = value
    np.testing.assert_allclose(counts.group_weights, weights, rtol=1e-5, atol=1e-5)
    experts = counts.info.num_experts
    for (kind, rank), layers in counts.vocabulary.items():
        found = {
            (layer, int(key) // 3 // experts, int(key) // 3 % experts, int(key) % 3): n
            for layer, tally in enumerate(layers)
            for key, n in zip(tally.keys, tally.counts, strict=True)
        }
        assert found == dict(want[kind, rank]), (kind, rank)
    assert len(counts.vocabulary) == 6
    for kind, tally in counts.occurrences.items():
        pairs = zip(tally.keys, tally.counts, strict=True)
        assert {(int(k) // 3, int(k) % 3): n for k, n in pairs} == dict(want["occurrences", kind])
    assert counts.info.num_tokens == 900
    assert counts.info.num_documents == len(set(source.tokens.documents.tolist()))


def assert_same(one, two):
    for field in dataclasses.fields(counts_lib.Counts):
        a, b = getattr(one, field.name), getattr(two, field.name)
        if field.name == "info":
            assert dataclasses.replace(a, num_documents=0) == dataclasses.replace(
                b, num_documents=0
            )
        elif isinstance(a, dict):
            assert a.keys() == b.keys()
            for key in a:
                one_by_one = zip(*(x if isinstance(x, tuple) else (x,) for x in (a[key], b[key])),
                                 strict=True)  # fmt: skip
                for x, y in one_by_one:
                    np.testing.assert_array_equal(x.keys, y.keys)
                    np.testing.assert_array_equal(x.counts, y.counts)
        elif isinstance(a, np.ndarray) and a.dtype == np.float64:
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)  # order of summation, float32
        else:
            np.testing.assert_array_equal(a, b)


@hypothesis.given(st.lists(st.integers(0, 97), max_size=4), st.integers(1, 50))
def test_parts_merge_to_the_whole(cuts, size):
    source = synthetic.make_trace(tokens=97, documents=11, missing=0.1)
    whole = counting.count(source, folds=4)
    edges = [0, *sorted(cuts), 97]
    parts = []
    for start, end in itertools.pairwise(edges):
        part = trace.MemoryTrace(source.info, trace.cut(source.tokens, slice(start, end)))
        if start < end:
            parts.append(counting.count(part, size=size, folds=4))
    assert_same(counts_lib.merge(parts), whole)


def test_tallies_that_grow_past_their_patience_are_right(monkeypatch):
    monkeypatch.setattr("olmoe_jax.analysis.tallies._PATIENCE", 5)
    source = synthetic.make_trace()
    few = counting.count(source, size=31)
    monkeypatch.undo()
    assert_same(few, counting.count(source))


@pytest.mark.parametrize("cores", [1, 5])
def test_layers_are_counted_in_threads_without_touching_each_other(cores, monkeypatch):
    source = synthetic.make_trace(layers=tuple(range(6)), tokens=3000, missing=0.05)
    monkeypatch.setattr(counting.machine, "cores", lambda: cores)
    found = counting.count(source, size=500)
    for place in range(6):
        ids = source.tokens.expert_ids[:, [place]]
        alone = counting.count(
            trace.MemoryTrace(
                dataclasses.replace(source.info, layers=(place,)),
                dataclasses.replace(source.tokens, expert_ids=ids, weights=None),
            )
        )
        for name in ("topk", "top1", "group_topk"):
            np.testing.assert_array_equal(
                getattr(found, name)[..., place, :], getattr(alone, name)[..., 0, :]
            )
        for name in ("pairs", "adjacent"):
            np.testing.assert_array_equal(
                getattr(found, name)[:, place], getattr(alone, name)[:, 0]
            )
        for name, tallies in found.vocabulary.items():
            np.testing.assert_array_equal(tallies[place].keys, alone.vocabulary[name][0].keys)
            np.testing.assert_array_equal(tallies[place].counts, alone.vocabulary[name][0].counts)


def test_pooled_domains_keep_their_documents_apart():
    parts = [counting.count(synthetic.make_trace(seed=s, domain=d))
             for s, d in ((0, "books"), (1, "code"))]  # fmt: skip
    pooled = counts_lib.pool(parts)
    np.testing.assert_array_equal(
        pooled.group_topk, np.concatenate([part.group_topk for part in parts])
    )
    np.testing.assert_array_equal(pooled.pairs, parts[0].pairs + parts[1].pairs)
    assert (pooled.info.domain, pooled.info.num_tokens) == ("books, code", 1200)
    with pytest.raises(ValueError, match="num_experts 7, .* has 8"):
        counts_lib.pool([parts[0], counting.count(synthetic.make_trace(experts=8))])


def _flipped(data, place):
    place %= len(data)
    return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"no zip",
        lambda data: data[: len(data) // 2],
        lambda data: _flipped(data, len(data) // 3),  # in deflated numbers
        lambda data: _flipped(data, data.index(b"PK\1\2") + 10),  # how they are compressed
        lambda data: _flipped(data, data.index(b"PK\1\2") + 29),  # the length of a name
        lambda data: data.replace(b"group_topk.npy", b"group_tipk.npy"),
    ],
    ids=["empty", "no zip", "torn", "number", "method", "directory", "name"],
)
def test_damaged_counts_are_one_error_and_counted_anew(damage, tmp_path):
    source = trace_files.write(tmp_path / "trace", synthetic.make_trace(tokens=90, documents=9))
    whole = counts_files.of_trace(source)
    path = source.path / counts_files.NAME
    data = path.read_bytes()
    path.write_bytes(damage(data))
    assert path.read_bytes() != data
    with pytest.raises(ValueError, match="not a file of routing counts"):
        counts_files.load(path)
    assert_same(counts_files.of_trace(source), whole)
    assert counts_files.load(path).info == whole.info


@pytest.mark.parametrize("vocabulary", [True, False])
def test_a_file_holds_all_of_it(tmp_path, vocabulary):
    source = synthetic.make_trace(checkpoint="step5", step=5, near_ties=(3, 1))
    counts = counting.count(source, size=101, vocabulary=vocabulary)
    counts_files.save(tmp_path / "counts.npz", counts)
    loaded = counts_files.load(tmp_path / "counts.npz")
    assert loaded.info == counts.info and loaded.path_layers == counts.path_layers
    assert_same(loaded, counts)
    assert [path.name for path in tmp_path.iterdir()] == ["counts.npz"]


def test_a_source_without_weights_or_predictions_says_so():
    source = synthetic.make_trace(weights=False)
    block = dataclasses.replace(source.tokens, predicted_ids=np.full(600, -1, np.int32))
    counts = counting.count(trace.MemoryTrace(source.info, block))
    assert counts.group_weights is None
    assert {kind for kind, _ in counts.vocabulary} == {"input", "next"}


def test_bad_ids_and_files_are_refused(tmp_path):
    source = synthetic.make_trace()
    ids = source.tokens.expert_ids.copy()
    ids[5, 1, 2] = 7
    broken = dataclasses.replace(source.tokens, expert_ids=ids)
    with pytest.raises(ValueError, match="expert id 7; the model has 7 experts"):
        counting.count(trace.MemoryTrace(source.info, broken))
    ids[5, 1, 2] = ids[5, 1, 0]
    with pytest.raises(ValueError, match="layer 4: a token has one expert twice"):
        counting.count(trace.MemoryTrace(source.info, broken))
    empty = trace.MemoryTrace(source.info, trace.cut(source.tokens, slice(0)))
    with pytest.raises(ValueError, match="on books: holds no token"):
        counting.count(empty)
    wide = dataclasses.replace(source.tokens, input_ids=np.full(600, 2**27, np.int32))
    with pytest.raises(ValueError, match="fewer folds"):
        counting.count(trace.MemoryTrace(source.info, wide))
    with pytest.raises(FileNotFoundError, match="no such file"):
        counts_files.load(tmp_path / "none.npz")
