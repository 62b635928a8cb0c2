import json

import numpy as np
import pytest

from olmoe_jax.analysis import texts
from olmoe_jax.data import layout, pipeline, preparation
from olmoe_jax.data import tokenizer as tokenizer_lib
from tests.analysis import models

WORDS = "the router sends a token to an expert of its own and the next one elsewhere ".split()


def _prose(seed, words):
    rng = np.random.default_rng(seed)
    return " ".join(rng.choice(WORDS, words))


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_lib.train([_prose(0, 300)], vocab_size=300)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, tokenizer):
    """(prepared data of two domains, {domain: its documents})."""
    folder, documents = tmp_path_factory.mktemp("corpus"), {"a": [], "b": []}
    with (folder / "all.jsonl").open("w") as file:
        for n in range(40):
            name = "ab"[n % 3 == 0]
            documents[name].append(_prose(n, 5 + n))
            file.write(json.dumps({"id": str(n), "domain": name, "text": documents[name][-1]}))
            file.write("\n")
    (folder / "tokenizer.json").write_bytes(tokenizer.json)
    preparation.prepare(
        [str(folder / "all.jsonl")], folder / "data", sequence_length=16,
        tokenizer=str(folder / "tokenizer.json"), validation_fraction=0.3, announce=print,
    )  # fmt: skip
    return folder / "data", documents


@pytest.mark.parametrize("split", layout.SPLITS)
def test_prepared_data_give_each_domains_documents_in_order(corpus, tokenizer, split):
    path, documents = corpus
    data = pipeline.open(path)
    found = texts.from_prepared(path, context_length=7, split=split)
    assert [t.domain for t in found] == ["a", "b"]
    seen = 0
    for text in found:
        ends = np.flatnonzero(text.tokens == tokenizer.end_of_document)
        assert len(ends) == text.num_documents == len(set(text.documents.tolist()))
        starts = np.concatenate([[0], ends[:-1] + 1])
        decoded = [tokenizer.decode(text.tokens[a:b]) for a, b in zip(starts, ends, strict=True)]
        places = [documents[text.domain].index(d) for d in decoded]
        assert places == sorted(places) and len(set(places)) == len(places)
        for n, (a, b) in enumerate(zip(starts, ends, strict=True)):
            assert (text.documents[a : b + 1] == n).all()
        seen += len(ends)
        assert text.tokenizer.sha256 == tokenizer.sha256
    assert seen == data.info.splits[split].documents > 5


def test_text_files_are_a_domain_each_and_json_lines_name_theirs(tmp_path, tokenizer):
    prose = {"x": _prose(1, 40), "y": _prose(2, 30)}
    (tmp_path / "x.txt").write_text(f"{prose['x']}\n<|endoftext|>\n{prose['y']}\n")
    lines = [{"text": prose["x"], "domain": "z"}, {"text": prose["y"], "source": "y"}]
    (tmp_path / "more.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = texts.from_files([tmp_path / "*.txt", str(tmp_path / "more.jsonl")], tokenizer)
    assert [(t.domain, t.num_documents) for t in found] == [("x", 2), ("y", 1), ("z", 1)]
    decoded = [tokenizer.decode(t.tokens).strip() for t in found]
    assert decoded == [f"{prose['x']}\n{prose['y']}", prose["y"], prose["x"]]
    first = found[0].documents.argmax()
    assert tokenizer.decode(found[0].tokens[first:]).strip() == prose["y"]


@pytest.mark.parametrize("limit", [1, 20, 33])
def test_a_limit_cuts_each_domain_and_a_folder_changes_nothing(corpus, tmp_path, tokenizer, limit):
    path, documents = corpus
    whole = texts.from_prepared(path, context_length=7, split="train")
    options = {"context_length": 7, "split": "train", "max_tokens": limit}
    for folder in (None, tmp_path / "streams"):
        for full, cut in zip(
            whole, texts.from_prepared(path, folder=folder, **options), strict=True
        ):
            np.testing.assert_array_equal(cut.tokens, full.tokens[:limit])
            np.testing.assert_array_equal(cut.documents, full.documents[:limit])
    (tmp_path / "d.txt").write_text("\n".join(documents["a"]))
    files = [
        texts.from_files([str(tmp_path / "d.txt")], tokenizer, max_tokens=n, folder=folder)[0]
        for n, folder in ((None, None), (limit, None), (limit, tmp_path / "streams"))
    ]
    for cut in files[1:]:
        np.testing.assert_array_equal(cut.tokens, files[0].tokens[:limit])
    assert files[1].data == files[2].data != files[0].data


def test_windows_and_next_tokens_by_a_loop():
    text = models.text("a", 25, documents=4, length=7)
    assert text.num_windows == 4
    tokens, real = text.windows(1, 5)
    for w in range(4):
        for i in range(7):
            at = (w + 1) * 7 + i
            assert real[w, i] == (at < 25)
            assert tokens[w, i] == (text.tokens[at] if at < 25 else 0)
    for start, stop in ((0, 4), (1, 2), (2, 4)):
        found = text.next_ids(start, stop)
        for i, got in enumerate(found):
            at = start * 7 + i
            follows = at < 24 and text.documents[at] == text.documents[at + 1]
            assert got == (text.tokens[at + 1] if follows else -1)
        assert len(found) == min(stop * 7, 25) - start * 7


def test_what_identifies_a_text():
    text = models.text("a", 25)
    same = texts.Text("b", text.tokens.copy(), text.documents.copy(), text.context_length)
    assert same.data == text.data
    others = [models.text("a", 25, seed=1), models.text("a", 25, documents=2),
              models.text("a", 24), models.text("a", 25, length=5)]  # fmt: skip
    assert len({t.data for t in (text, *others)}) == 5


def test_documents_longer_than_the_context_are_stated():
    assert models.text("a", 30, documents=3, length=10).remarks() == ()
    (remark,) = models.text("a", 30, documents=3, length=9).remarks()
    assert "3 of 3 documents are longer than the context of 9 tokens" in remark


def test_what_is_wrong_is_refused(corpus, tmp_path, tokenizer):
    path, _ = corpus
    for options, message in [
        ({"domains": ["c"]}, "no domain 'c'; it has a, b"),
        ({"split": "test"}, "split is 'test': must be one of train, validation"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"context_length": 0}, "context_length is 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            texts.from_prepared(path, **options)
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="empty.txt: holds no text"):
        texts.from_files([str(tmp_path / "empty.txt")], tokenizer)
    with pytest.raises(FileNotFoundError, match="no file matches"):
        texts.from_files([str(tmp_path / "none*.txt")], tokenizer)
    none = np.zeros(0, np.int32)
    with pytest.raises(ValueError, match="domain 'a' is empty"):
        texts.Text("a", none, none)
    with pytest.raises(ValueError, match=r"documents are int32 \[2\], expected int32 \[3\]"):
        texts.Text("a", np.zeros(3, np.int32), np.zeros(2, np.int32))


def test_a_domain_without_validation_is_left_out_and_said(tmp_path, tokenizer):
    records = [{"text": _prose(n, 60), "domain": "many"} for n in range(12)]
    records.append({"text": _prose(50, 3), "domain": "one"})
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.json)
    preparation.prepare(
        [str(tmp_path / "all.jsonl")], tmp_path / "data", sequence_length=8,
        tokenizer=str(tmp_path / "tokenizer.json"), validation_fraction=0.2, announce=print,
    )  # fmt: skip
    said = []
    found = texts.from_prepared(tmp_path / "data", announce=said.append)
    assert [t.domain for t in found] == ["many"]
    assert said == ["note: empty in the split validation, so left out: one"]
    with pytest.raises(ValueError, match="domain 'one' is empty in the split validation"):
        texts.from_prepared(tmp_path / "data", domains=["one"])


def test_tokenizers_are_the_same_if_their_ids_mean_the_same(tokenizer):
    content = json.loads(tokenizer.json)
    respelt = tokenizer_lib.Tokenizer(json.dumps(content).encode())
    assert respelt.sha256 != tokenizer.sha256
    assert texts.same_tokens(tokenizer, respelt)
    other = tokenizer_lib.train([_prose(9, 300) + " something quite different"], vocab_size=300)
    assert not texts.same_tokens(tokenizer, other)
    content["model"]["merges"] = content["model"]["merges"][::-1]
    merged = tokenizer_lib.Tokenizer(json.dumps(content).encode())
    assert not texts.same_tokens(tokenizer, merged)
