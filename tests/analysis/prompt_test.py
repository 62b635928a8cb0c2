import numpy as np
import pytest

import olmoe_jax
from olmoe_jax.analysis import prompt
from olmoe_jax.data import tokenizer as tokenizer_lib
from tests.analysis import models

TEXTS = ("the word is long", "return the word, naïve")


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_lib.train(["the word is long def return"], vocab_size=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return models.folder(tmp_path_factory.mktemp("m") / "olmoe", vocab_size=300, max_length=64)


@pytest.mark.parametrize("streamed", [False, True])
def test_the_experts_are_those_of_the_model(folder, tokenizer, streamed):
    found = prompt.route(folder, TEXTS, tokenizer, streamed=streamed, announce=lambda line: None)
    model, params = olmoe_jax.load(folder)
    for text, one in zip(TEXTS, found, strict=True):
        (ids,) = tokenizer.encode_batch([text])
        out = model.apply({"params": params}, ids[None].astype(np.int32), return_routing=True)
        want = np.asarray(out.routing.expert_ids)[:, 0].swapaxes(0, 1)
        np.testing.assert_array_equal(one.input_ids, ids)
        np.testing.assert_array_equal(one.expert_ids, want)
        np.testing.assert_array_equal(one.predicted_ids, np.asarray(out.logits)[0].argmax(-1))
        assert one.weights.shape == one.expert_ids.shape
        assert (np.diff(one.weights, axis=-1) <= 0).all()
        assert "".join(one.pieces).replace("�", "") == text


def test_a_character_of_several_tokens_stands_at_its_last(tokenizer):
    (ids,) = tokenizer.encode_batch(["aïb"])
    assert len(ids) == 4
    assert prompt.pieces(ids, tokenizer) == ("a", "�", "ï", "b")


def test_json_has_tokens_and_layers(folder, tokenizer):
    found = prompt.route(folder, TEXTS[:1], tokenizer, announce=lambda line: None)
    content = prompt.to_json(found)
    (one,) = content["prompts"]
    assert one["text"] == TEXTS[0] and content["model"] == "olmoe"
    assert [t["id"] for t in one["tokens"]] == found[0].input_ids.tolist()
    for row, layer in enumerate(found[0].info.layers):
        np.testing.assert_array_equal(one["layers"][layer]["experts"], found[0].expert_ids[:, row])


@pytest.mark.parametrize("text, message", [("", "holds no token"), ("a" * 99, "takes 64 at most")])
def test_a_text_that_cannot_be_read_is_refused(folder, tokenizer, text, message):
    with pytest.raises(ValueError, match=message):
        prompt.route(folder, (text,), tokenizer)
