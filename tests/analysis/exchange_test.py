import base64
import csv
import dataclasses
import json

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from olmoe_jax.analysis import exchange, foreign, trace
from tests.analysis import models

EXPERTS = models.EXPERTS
FORMS = ("npz", "jsonl", "csv")
SETTINGS = hypothesis.settings(derandomize=True, deadline=None, max_examples=12)


def same(a, b):
    for field in dataclasses.fields(trace.Block):
        x, y = getattr(a, field.name), getattr(b, field.name)
        assert (x is None) == (y is None), field.name
        if x is not None:
            assert x.dtype == y.dtype, field.name
            np.testing.assert_array_equal(x, y, field.name)


@pytest.mark.parametrize("form", FORMS)
@SETTINGS
@hypothesis.given(
    tokens=st.integers(1, 6), layers=st.sampled_from([(0,), (1, 3), (0, 1, 5)]),
    k=st.integers(1, 4), weights=st.booleans(), losses=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_what_is_written_is_read_again(
    tmp_path_factory, form, tokens, layers, k, weights, losses, seed
):
    source, _ = models.random_trace(tokens, layers, k, seed=seed, weights=weights, losses=losses)
    path = tmp_path_factory.mktemp("forms") / f"a.{form}"
    exchange.write(path, source)
    found = exchange.read(path, num_experts=EXPERTS)
    same(found.tokens, source.tokens)
    assert found.info.layers == source.info.layers
    assert form == "csv" or found.info == source.info
    with pytest.raises(FileExistsError, match="exists"):
        exchange.write(path, source)


def test_arrays_of_vllm_and_sglang_are_read(tmp_path):
    ids = models.random_trace()[0].tokens.expert_ids
    np.save(tmp_path / "vllm.npy", ids.astype(np.uint8))
    received = base64.b64encode(ids.astype(np.int32).tobytes())
    sglang = np.frombuffer(base64.b64decode(received), np.int32).reshape(5, 2, 3)
    np.savez(tmp_path / "sglang.npz", routed_experts=sglang, input_ids=np.arange(5))
    for name, inputs in (("vllm.npy", [-1] * 5), ("sglang.npz", range(5))):
        found = exchange.read(tmp_path / name, num_experts=EXPERTS, model="m", domain="chat")
        np.testing.assert_array_equal(found.tokens.expert_ids, ids)
        assert found.tokens.weights is None and found.tokens.losses is None
        assert found.tokens.input_ids.tolist() == list(inputs)
        assert (found.info.model, found.info.domain, found.info.layers) == ("m", "chat", (0, 1))


def test_placeholders_of_dense_layers_are_left_out():
    ids = models.random_trace(layers=(0, 1))[0].tokens.expert_ids
    padded = np.stack([np.zeros_like(ids[:, 0]), ids[:, 0], ids[:, 1]], axis=1)
    found = foreign.make(padded, num_experts=EXPERTS)
    assert found.info.layers == (1, 2)
    np.testing.assert_array_equal(found.tokens.expert_ids, ids)
    assert foreign.make(padded, num_experts=EXPERTS, layers=(4, 5, 6)).info.layers == (5, 6)
    with pytest.raises(ValueError, match="all ids are 0.*recorded nothing"):
        foreign.make(np.zeros((5, 2, 3), int), num_experts=EXPERTS)


def test_logits_give_ids_and_weights_as_a_loop_does():
    source, scores = models.random_trace()
    for found in (
        foreign.make(router_logits=scores, k=3),
        foreign.make(source.tokens.expert_ids, router_logits=scores),
        foreign.make(source.tokens.expert_ids[..., ::-1], router_logits=scores),
    ):
        np.testing.assert_array_equal(found.tokens.expert_ids, source.tokens.expert_ids)
        np.testing.assert_allclose(found.tokens.weights, source.tokens.weights, rtol=1e-6)
    probs = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    found = foreign.make(router_logits=probs, k=3, probabilities=True)
    np.testing.assert_allclose(found.tokens.weights, source.tokens.weights, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, "bfloat16"])
def test_probabilities_that_pose_as_logits_are_refused(dtype):
    _, scores = models.random_trace()
    probs = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    with pytest.raises(ValueError, match="are probabilities.*every row sums to 1"):
        foreign.make(router_logits=probs.astype(dtype), k=3)
    with pytest.raises(ValueError, match="rows of probabilities must sum to 1"):
        foreign.make(router_logits=scores, k=3, probabilities=True)


def test_renormalised_weights_are_refused_unless_ignored():
    block = models.random_trace()[0].tokens
    weights = block.weights / block.weights.sum(-1, keepdims=True)
    with pytest.raises(ValueError, match="renormalised"):
        foreign.make(block.expert_ids, weights=weights, num_experts=EXPERTS)
    found = foreign.make(
        block.expert_ids, weights=weights, num_experts=EXPERTS, ignore_weights=True
    )
    assert found.tokens.weights is None


def _changed(**changes):
    block = models.random_trace()[0].tokens
    arrays = {"expert_ids": block.expert_ids.astype(int), "num_experts": EXPERTS}
    return arrays | {name: change(block) for name, change in changes.items()}


def _ids(place, value):
    def change(block):
        ids = block.expert_ids.astype(type(value))
        ids[place] = value
        return ids

    return change


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (_changed(expert_ids=_ids((2, 1, 0), 7)), r"token 2, layer 1.*expected 0\.\.6"),
        (_changed(expert_ids=_ids((2, 1, 0), -2)), r"token 2, layer 1.*expected 0\.\.6"),
        (_changed(expert_ids=_ids((3, 0, slice(None)), 4)), "token 3, layer 0.*occurs twice"),
        (_changed(expert_ids=_ids((0, 0, 0), 0.5)), "expert_ids are float64, expected integers"),
        (_changed(expert_ids=lambda b: b.expert_ids[0]), r"expected \[tokens, layers, k\]"),
        (_changed(expert_ids=lambda b: b.expert_ids[:0]), r"expected \[tokens, layers, k\]"),
        (_changed(num_experts=lambda b: 2), "3 ids per token, but 2 experts"),
        (_changed(num_experts=lambda b: None), "num_experts is not known"),
        (_changed(weights=lambda b: b.weights[:-1]), "weights are"),
        (_changed(weights=lambda b: 3 * b.weights), "must be softmax values"),
        (_changed(weights=lambda b: b.weights - 1), "must be softmax values"),
        (_changed(input_ids=lambda b: np.arange(6)), "5 tokens with expert ids"),
        (_changed(documents=lambda b: np.array([0, 1, 1, 0, 2])), "never fall"),
        (_changed(layers=lambda b: (1, 2, 3)), "3 numbers of layers"),
        (_changed(expert_ids=lambda b: None), "neither expert_ids nor router_logits"),
        (_changed(router_logits=lambda b: np.zeros((5, 2, 9))), "7 experts, but 9 logits"),
        (_changed(router_logits=lambda b: np.full((5, 2, 7), np.nan)), "finite"),
        (_changed(model_name=lambda b: "m"), "unknown model_name"),
    ],
)
def test_arrays_that_are_wrong_are_refused(arrays, message):
    with pytest.raises(ValueError, match=message):
        foreign.make(**arrays)


def test_a_file_that_is_wrong_says_where(tmp_path):
    source, _ = models.random_trace()
    for form in FORMS:
        exchange.write(tmp_path / f"a.{form}", source)
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    row = json.loads(lines[2])
    bad = [
        (lines[:2] + ["{"], "line 3: not JSON"),
        (lines[:2] + ["[1]"], "line 3: expected an object"),
        (lines[:2] + [json.dumps(row | {"expert_ids": [[1, 2], [3, 4, 5]]})], "line 3: expert_ids"),
        (lines[:2] + [json.dumps(row | {"input_id": [1]})], "line 3: input_id"),
        (lines[:1], "holds no token"),
        (lines[:-1], "num_tokens is 5 by its info, 4 by its arrays"),
        (['{"trace": {"model": "m"}}'], "TraceInfo is damaged"),
    ]
    for content, message in bad:
        (tmp_path / "bad.jsonl").write_text("\n".join(content))
        with pytest.raises(ValueError, match=message):
            exchange.read(tmp_path / "bad.jsonl")
    rows = list(csv.reader((tmp_path / "a.csv").open()))
    at = rows[0].index("layer")
    for change, message in [
        (lambda r: r[3].pop(), "line 4: .*values, expected"),
        (lambda r: r.pop(3), "line 4: layer 3: every token must have the layers.*1, 3"),
        (lambda r: r.pop(), "line 11: the end of the file: every token must have"),
        (lambda r: r[3].__setitem__(at, "x"), "column layer"),
        (lambda r: r[3].__setitem__(rows[0].index("input_id"), "77"), "input_id differs between"),
        (lambda r: r[0].__setitem__(at, "depth"), "expected layer, expert_0"),
        (lambda r: r.__delitem__(slice(1, None)), "holds no token"),
    ]:
        copy = [list(r) for r in rows]
        change(copy)
        with (tmp_path / "bad.csv").open("w", newline="") as file:
            csv.writer(file).writerows(copy)
        with pytest.raises(ValueError, match=message):
            exchange.read(tmp_path / "bad.csv", num_experts=EXPERTS)
    (tmp_path / "bad.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:90])
    np.savez(tmp_path / "other.npz", ids=np.zeros(3))
    np.savez(tmp_path / "pickled.npz", expert_ids=np.array([{}]))
    for name, message in [
        ("bad.npz", "numpy.load"),
        ("other.npz", "holds ids"),
        ("pickled.npz", "numpy.load"),
    ]:
        with pytest.raises(ValueError, match=message):
            exchange.read(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no such file"):
        exchange.read(tmp_path / "none.npy")
    with pytest.raises(ValueError, match="ends in .npy"):
        exchange.read(tmp_path / "a.parquet")
