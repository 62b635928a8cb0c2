import numpy as np
import pytest

from olmoe_jax.data import corpora, layout, packing, pieces

RNG = np.random.default_rng(11)


def _piece(sizes, domains, keys, first=0):
    lengths = np.array(sizes, np.int64)
    records = [
        {"id": f"{first + i}", "source": "s", "domain": d, "first_words": ""}
        for i, d in enumerate(domains)
    ]
    return pieces.Piece(
        tokens=RNG.integers(2, 89, lengths.sum()).astype(np.uint32),
        lengths=lengths,
        text_bytes=lengths * 3,
        keys=np.array(keys, np.float64),
        records=records,
    )


@pytest.fixture
def saved(tmp_path):
    """Two pieces: (paths, the pieces)."""
    sizes = [[5, 17, 1, 40, 3], [2, 29]]
    domains = [["b", "a", "b", "a", "c"], ["a", "b"]]
    keys = [[0.9, 0.05, 0.3, 0.5, 0.01], [0.02, 0.6]]
    made = [_piece(*columns) for columns in zip(sizes, domains, keys, strict=True)]
    paths = [str(tmp_path / f"{i}.npz") for i in range(2)]
    for piece, path in zip(made, paths, strict=True):
        pieces.save(piece, path)
    return paths, made


@pytest.mark.parametrize("length", [2, 7, 97, 13])
@pytest.mark.parametrize("split", layout.SPLITS)
def test_windows_are_the_documents_of_the_split_one_after_the_other(saved, split, length):
    paths, made = saved
    plan = packing.Plan(paths, {"a": 0.1, "b": 0.0, "c": 0.4})
    held_out = {1, 4, 5}  # a with keys 0.05 and 0.02, c with 0.01
    wanted = [i for i in range(7) if (i in held_out) == (split == "validation")]
    documents = [d for p in made for d in np.split(p.tokens, np.cumsum(p.lengths)[:-1])]
    domains = [
        0 if r["domain"] == "a" else 1 if r["domain"] == "b" else 2 for p in made for r in p.records
    ]
    tokens = np.concatenate([documents[i] for i in wanted])
    found = list(packing.windows(plan, split, length))
    assert len(found) == -(-len(tokens) // length)
    joined = {k: np.concatenate([w[k] for w in found]) for k in found[0]}
    assert [joined[k].dtype for k in ("tokens", "documents", "domains")] == [
        "int32",
        "int32",
        "uint8",
    ]
    assert joined["tokens"][: len(tokens)].tolist() == tokens.tolist()
    owner = [i for i in wanted for _ in documents[i]]
    assert joined["documents"][: len(tokens)].tolist() == owner
    assert joined["domains"][: len(tokens)].tolist() == [domains[i] for i in owner]
    assert (joined["documents"][len(tokens) :] == layout.PADDING_DOCUMENT).all()
    assert not joined["tokens"][len(tokens) :].any()


def test_a_large_domain_gives_the_fraction(tmp_path):
    sizes, keys = [7] * 5000, RNG.random(5000)
    pieces.save(_piece(sizes, ["a"] * 5000, keys), tmp_path / "p.npz")
    plan = packing.plan([str(tmp_path / "p.npz")], 0.1, sequence_length=11)
    assert plan.thresholds == {"a": 0.1}
    held_out = plan.held_out(pieces.load(tmp_path / "p.npz"))
    assert held_out.tolist() == (keys < 0.1).tolist()


def test_every_domain_with_enough_text_is_validated_and_none_loses_most_of_it(tmp_path):
    # a: many documents, none below the fraction; b: two halves; c: one document; d: one dominates
    sizes = [3] * 100 + [20, 20] + [50] + [500, 2]
    domains = ["a"] * 100 + ["b"] * 2 + ["c"] + ["d"] * 2
    keys = [0.5 + i / 1000 for i in range(100)] + [0.7, 0.8] + [0.2] + [0.1, 0.9]
    path = tmp_path / "p.npz"
    pieces.save(_piece(sizes, domains, keys), path)
    plan = packing.plan([str(path)], 0.001, sequence_length=13)
    held_out = plan.held_out(pieces.load(path))
    tokens = {
        d: sum(s for s, x, h in zip(sizes, domains, held_out, strict=True) if h and x == d)
        for d in "abcd"
    }
    assert 30 <= tokens["a"] <= 33  # a tenth, rounded up to whole documents
    assert tokens["b"] == 20
    assert tokens["c"] == tokens["d"] == 0
    none = packing.plan([str(path)], 0.0, sequence_length=13)
    assert not none.held_out(pieces.load(path)).any()


def test_the_choice_does_not_depend_on_how_documents_lie_in_pieces(tmp_path):
    sizes, keys = RNG.integers(1, 60, 300).tolist(), RNG.random(300).tolist()
    domains = [str(d) for d in RNG.integers(0, 5, 300)]
    pieces.save(_piece(sizes, domains, keys), tmp_path / "whole.npz")
    paths = []
    for start in range(0, 300, 37):
        part = slice(start, start + 37)
        paths.append(str(tmp_path / f"{start}.npz"))
        pieces.save(_piece(sizes[part], domains[part], keys[part]), paths[-1])
    whole = packing.plan([str(tmp_path / "whole.npz")], 0.02, sequence_length=17)
    assert packing.plan(paths, 0.02, sequence_length=17).thresholds == whole.thresholds


def test_too_many_domains_and_no_text_are_errors(tmp_path):
    count = packing.MAX_DOMAINS + 1
    path = tmp_path / "p.npz"
    pieces.save(_piece([2] * count, [f"d{i}" for i in range(count)], RNG.random(count)), path)
    with pytest.raises(ValueError, match="more than 255 domains.*'d255'"):
        packing.plan([str(path)], 0.1, 5)
    pieces.save(_piece([], [], []), path)
    with pytest.raises(ValueError, match="the corpus is empty"):
        packing.plan([str(path)], 0.1, 5)


def test_copies_of_a_text_fall_into_one_split_and_seeds_differ():
    keys = [pieces.split_key("a text", seed) for seed in (0, 0, 1)]
    assert keys[0] == keys[1] != keys[2]
    many = np.array([pieces.split_key(f"text {i}", 0) for i in range(2000)])
    assert abs(many.mean() - 0.5) < 0.05 and many.min() >= 0 and many.max() < 1


def test_a_piece_comes_back_from_disk(tmp_path, prepared):
    documents = [corpora.Document(r["id"], r["text"], r["source"], "d") for r in prepared.records]
    piece = pieces.tokenise(documents, prepared.tokenizer, seed=0)
    pieces.save(piece, tmp_path / "p.npz")
    found = pieces.load(tmp_path / "p.npz")
    assert found.records == piece.records
    for name in ("tokens", "lengths", "text_bytes", "keys"):
        assert getattr(found, name).tolist() == getattr(piece, name).tolist()
    ends = found.tokens[np.cumsum(found.lengths) - 1]
    assert (ends == prepared.tokenizer.end_of_document).all()
    texts = [
        prepared.tokenizer.decode(ids[:-1])
        for ids in np.split(found.tokens, np.cumsum(found.lengths)[:-1])
    ]
    assert texts == [r["text"] for r in prepared.records]
    assert [p.name for p in tmp_path.iterdir()] == ["p.npz"]
