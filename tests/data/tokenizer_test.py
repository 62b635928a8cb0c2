import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from olmoe_jax.data import tokenizer

TEXTS = ["the cat sat on the mat\n" * 3, "a dog, naïve – and 3 cats", "  indented\n\tcode()"] * 5
TRAINED = tokenizer.train(TEXTS, vocab_size=277)


def test_training_is_deterministic_and_of_the_exact_size():
    again = tokenizer.train(iter(TEXTS), vocab_size=277)
    assert again == TRAINED
    assert again.sha256 == TRAINED.sha256
    assert TRAINED.vocab_size == 277
    assert TRAINED.end_of_document == 1
    assert tokenizer.train(TEXTS, vocab_size=276).sha256 != TRAINED.sha256


@given(st.text(max_size=60))
def test_any_text_survives_and_its_bytes_are_counted_exactly(text):
    (ids,) = TRAINED.encode_batch([text])
    assert TRAINED.decode(ids) == text
    assert TRAINED.token_bytes[ids].sum() == len(text.encode())


def test_a_document_cannot_spell_its_own_end():
    (ids,) = TRAINED.encode_batch(["before <|endoftext|> after <|padding|>"])
    assert not np.isin(ids, [0, 1]).any()
    assert TRAINED.token_bytes[[0, 1]].tolist() == [0, 0]


def test_a_prompt_begins_and_is_split_as_the_tokenizer_says():
    plain = TRAINED.encode_batch(["a b"])[0].tolist()
    assert TRAINED.encode_prompt("a b") == plain
    assert TRAINED.encode_prompt("<|endoftext|>a b") == [1, *plain]
    content = json.loads(TRAINED.json)
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|padding|>", "type_id": 0}},
                   {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "<|padding|>": {"id": "<|padding|>", "ids": [0], "tokens": ["<|padding|>"]}
        },
    }  # fmt: skip
    content["truncation"] = {
        "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    templated = tokenizer.Tokenizer(json.dumps(content).encode())
    assert templated.encode_prompt("a b") == [0, *plain]
    assert templated.encode_batch(["a b"])[0].tolist() == plain


def test_it_is_read_back_from_a_file_and_from_a_pickle(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(TRAINED.json)
    for found in (
        tokenizer.load(tmp_path / "tokenizer.json"),
        tokenizer.load(str(tmp_path)),
        pickle.loads(pickle.dumps(TRAINED)),
    ):
        assert found == TRAINED
        assert found.encode_batch(TEXTS)[0].tolist() == TRAINED.encode_batch(TEXTS)[0].tolist()


@pytest.mark.parametrize("content", [b"{}", b"not json", b'{"model": 3}', b"\xff\xfe"])
def test_a_file_that_is_no_tokenizer_is_one_clear_error(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x.json: not a tokenizer.json"):
        tokenizer.load(path)


def test_a_missing_file_and_a_missing_end_token_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.json: no such file"):
        tokenizer.load(tmp_path / "none.json")
    path = tmp_path / "x.json"
    path.write_bytes(TRAINED.json.replace(b"<|endoftext|>", b"<|something|>"))
    with pytest.raises(ValueError, match=r"x.json: no end-of-document token; .*</s>"):
        tokenizer.load(path)


def test_a_vocabulary_below_the_bytes_is_refused():
    with pytest.raises(ValueError, match="vocab_size is 257"):
        tokenizer.train(TEXTS, vocab_size=257)
