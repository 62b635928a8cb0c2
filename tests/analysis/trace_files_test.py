import dataclasses
import json

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from olmoe_jax.analysis import trace, trace_files
from tests.analysis import models

HALF = 2.0**-11  # float16 keeps so much of a weight
SETTINGS = hypothesis.settings(derandomize=True, deadline=None, max_examples=15)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(trace_files, "CHUNK_TOKENS", 4)


def _same(found, block):
    for field in dataclasses.fields(trace.Block):
        a, b = getattr(found, field.name), getattr(block, field.name)
        assert (a is None) == (b is None), field.name
        if field.name == "weights" and b is not None:
            assert a.dtype == np.float32
            np.testing.assert_allclose(a, b, rtol=HALF, atol=3e-8)
        elif b is not None:
            assert a.dtype == b.dtype, field.name
            np.testing.assert_array_equal(a, b, field.name)


@SETTINGS
@hypothesis.given(
    tokens=st.integers(1, 14), cuts=st.lists(st.integers(1, 13), max_size=4),
    size=st.integers(1, 9), k=st.integers(1, 3), weights=st.booleans(),
    losses=st.booleans(),
)  # fmt: skip
def test_a_trace_comes_back_from_the_disk(tmp_path_factory, tokens, cuts, size, k, weights, losses):
    path = tmp_path_factory.mktemp("traces") / "one"
    source, _ = models.random_trace(tokens, k=k, weights=weights, losses=losses)
    edges = sorted({0, tokens, *(c for c in cuts if c < tokens)})
    with trace_files.TraceWriter(path, source.info) as writer:
        for number, (a, b) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
            writer.add(trace.cut(source.tokens, slice(a, b)), np.array([number, 2]))
        written = writer.finish()
    found = trace_files.open_trace(path)
    assert found == written
    count = len(edges) - 1
    assert found.info.near_ties == (count * (count - 1) // 2, 2 * count)
    assert dataclasses.replace(found.info, near_ties=source.info.near_ties) == source.info
    blocks = list(found.blocks(size))
    assert max(map(len, blocks)) <= size
    _same(trace.join(blocks), source.tokens)


def test_a_chunk_is_what_the_format_says(tmp_path):
    source, _ = models.random_trace(6)
    path = trace_files.write(tmp_path / "one", source).path
    with np.load(path / "chunk_00000.npz") as arrays:
        assert {n: (a.dtype.str, a.shape) for n, a in arrays.items()} == {
            "expert_ids": ("|i1", (6, 2, 3)), "weights": ("<f2", (6, 2, 3)),
            "input_ids": ("<i4", (6,)), "predicted_ids": ("<i4", (6,)), "next_ids": ("<i4", (6,)),
            "documents": ("<i4", (6,)), "losses": ("<f4", (6,)),
        }  # fmt: skip
    content = json.loads((path / "trace.json").read_text())
    assert (content.pop("format"), content.pop("chunks")) == (1, [6])
    assert content.pop("job") is None
    assert content == json.loads(json.dumps(dataclasses.asdict(source.info)))
    assert trace_files.open_trace(path).info == source.info


def test_ids_above_127_survive(tmp_path):
    source, _ = models.random_trace(3)
    block = dataclasses.replace(source.tokens, expert_ids=source.tokens.expert_ids + 250)
    info = dataclasses.replace(source.info, num_experts=300)
    found = trace_files.write(tmp_path / "one", trace.MemoryTrace(info, block))
    assert (models.whole(found).expert_ids == block.expert_ids).all()
    block = dataclasses.replace(source.tokens, expert_ids=source.tokens.expert_ids + 121)
    info = dataclasses.replace(source.info, num_experts=128)
    found = trace_files.write(tmp_path / "two", trace.MemoryTrace(info, block))
    assert (models.whole(found).expert_ids == block.expert_ids).all()


def _interrupted(path, source, tokens=9):
    with trace_files.TraceWriter(path, source.info) as writer:
        for t in range(tokens):
            writer.add(trace.cut(source.tokens, slice(t, t + 1)), np.array([1, t]))


def test_what_was_interrupted_goes_on_behind_its_last_whole_chunk(tmp_path):
    source, _ = models.random_trace(11)
    _interrupted(tmp_path / "one", source)
    assert not (tmp_path / "one").exists()
    with pytest.raises(FileNotFoundError, match="recording did not finish"):
        trace_files.open_trace(tmp_path / "one")
    with trace_files.TraceWriter(tmp_path / "one", source.info) as writer:
        assert writer.tokens == 8
        for t in range(8, 11):
            writer.add(trace.cut(source.tokens, slice(t, t + 1)), np.array([1, t]))
        found = writer.finish()
    assert found.chunks == (4, 4, 3) and found.info.near_ties == (11, 55)
    _same(models.whole(found), source.tokens)
    with pytest.raises(FileExistsError, match="exists"):
        trace_files.TraceWriter(tmp_path / "one", source.info)


def test_a_chunk_that_was_damaged_is_written_again(tmp_path):
    source, _ = models.random_trace(11)
    _interrupted(tmp_path / "one", source)
    first = tmp_path / "one.partial" / "chunk_00000.npz"
    first.write_bytes(first.read_bytes()[:-1])
    with trace_files.TraceWriter(tmp_path / "one", source.info) as writer:
        assert writer.tokens == 0
        writer.add(source.tokens)
        _same(models.whole(writer.finish()), source.tokens)


def test_another_trace_does_not_go_on_with_it(tmp_path):
    source, _ = models.random_trace(11)
    _interrupted(tmp_path / "one", source)
    with pytest.raises(ValueError, match="left by another job.*precision"):
        trace_files.TraceWriter(
            tmp_path / "one", dataclasses.replace(source.info, precision="float32")
        )


def test_what_does_not_fit_is_refused_when_written(tmp_path):
    source, _ = models.random_trace(5)
    with trace_files.TraceWriter(tmp_path / "one", source.info) as writer:
        with pytest.raises(ValueError, match=r"expected \[tokens, \(2, 3\)\]"):
            writer.add(models.random_trace(5, k=2)[0].tokens)
        ids = source.tokens.expert_ids + 1
        with pytest.raises(ValueError, match=r"expected -1\.\.6"):
            writer.add(dataclasses.replace(source.tokens, expert_ids=ids))
        writer.add(trace.cut(source.tokens, slice(3)))
        with pytest.raises(ValueError, match="3 tokens were added, info says 5"):
            writer.finish()


def test_damage_is_noticed_when_read(tmp_path):
    source, _ = models.random_trace(6)
    path = trace_files.write(tmp_path / "one", source).path
    file, info = path / "chunk_00000.npz", path / "trace.json"
    whole, text = file.read_bytes(), info.read_text()
    middle = whole.index(b"weights.npy") + 60
    method = whole.index(b"PK\1\2") + 10  # how the first array is compressed
    for data in (
        whole[:-30], whole[:middle] + b"####" + whole[middle + 4 :], b"",
        whole[:method] + b"#" + whole[method + 1 :],
    ):  # fmt: skip
        file.write_bytes(data)
        with pytest.raises(ValueError, match="chunk_00000.npz: missing or damaged"):
            models.whole(trace_files.open_trace(path))
    file.unlink()
    with pytest.raises(ValueError, match="chunk_00000.npz: missing or damaged"):
        models.whole(trace_files.open_trace(path))
    other = trace_files.write(tmp_path / "two", models.random_trace(5)[0]).path
    file.write_bytes((other / "chunk_00000.npz").read_bytes())
    with pytest.raises(ValueError, match=r"expert_ids is \(5, 2, 3\), expected \(6, 2, 3\)"):
        models.whole(trace_files.open_trace(path))
    for changed, message in [
        (text.replace('"format": 1', '"format": 2'), "a trace of format 2"),
        (text.replace('"num_tokens": 6', '"num_tokens": 7'), "chunks of 6 tokens, but.* is 7"),
        (text.replace('"domain"', '"domains"'), "damaged"),
        (text[:40], "damaged"),
    ]:
        info.write_text(changed)
        with pytest.raises(ValueError, match=message):
            trace_files.open_trace(path)
    info.unlink()
    with pytest.raises(FileNotFoundError, match="no routing trace"):
        trace_files.open_trace(path)
