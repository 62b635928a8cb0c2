import dataclasses
import functools
import os
import shutil

import jax
import numpy as np
import pytest

import olmoe_jax
from olmoe_jax.analysis import layerwise, recording, running, scratch, sinks, texts, trace
from olmoe_jax.analysis import trace_files
from tests.analysis import models
from tests.porting import tiny

FP32 = 2e-6  # order of summation over three layers, of weights below 1
HALF = 2.0**-11  # float16, relative


class Blocks(list):
    """Accumulates by keeping."""

    def __init__(self, info):
        super().__init__()
        self.info = info

    add = list.append


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return models.folder(tmp_path_factory.mktemp("model") / "tiny")


def _texts():
    return [models.text("a", 50, seed=1), models.text("b/c", 7, seed=2), models.text("d", 33)]


def _record(model, texts, output=None, **options):
    options = {"announce": tiny.quiet, "tokens_per_batch": 2 * models.LENGTH} | options
    return list(recording.record(model, texts, output, **options))


def _same(a, b):
    for field in dataclasses.fields(trace.Block):
        np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name), field.name)


@functools.partial(jax.jit, static_argnums=0)
def _apply(model, params, tokens):
    return model.apply({"params": params}, tokens, return_routing=True)


def _expected(directory, text, **config):
    """Block by `model.apply`, window by window, and a NumPy loop."""
    model, params = olmoe_jax.load(directory, dtype="float32")
    model = olmoe_jax.Transformer(dataclasses.replace(model.config, **config))
    k, rows = model.config.num_experts_per_token, []
    for start in range(0, len(text.tokens), text.context_length):
        tokens = text.tokens[start : start + text.context_length]
        out = _apply(model, params, tokens[None])
        scores = np.asarray(out.routing.logits, np.float64)[:, 0]
        for t in range(len(tokens)):
            probs = np.exp(scores[:, t]) / np.exp(scores[:, t]).sum(axis=-1, keepdims=True)
            ids = np.argsort(-probs, axis=-1, kind="stable")[:, :k]
            at = start + t
            ends = at + 1 == len(text.tokens) or text.documents[at] != text.documents[at + 1]
            following = -1 if ends else text.tokens[at + 1]
            logits = np.asarray(out.logits, np.float64)[0, t]
            loss = np.nan if ends else np.log(np.exp(logits).sum()) - logits[following]
            predicted = logits[: model.config.vocab_size].argmax()
            rows.append((ids, np.take_along_axis(probs, ids, -1), predicted, following, loss))
    ids, weights, predicted, following, loss = map(np.array, zip(*rows, strict=True))
    return trace.Block(
        expert_ids=ids, weights=weights, input_ids=text.tokens, predicted_ids=predicted,
        next_ids=following, documents=text.documents, losses=loss,
    )  # fmt: skip


def _agrees(got, want):
    for name in ("expert_ids", "input_ids", "predicted_ids", "next_ids", "documents"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), name)
    np.testing.assert_allclose(got.weights, want.weights, atol=FP32)
    np.testing.assert_allclose(got.losses, want.losses, rtol=1e-5)


@pytest.mark.parametrize("streamed", [False, True])
def test_every_token_is_recorded_as_the_model_computes_it(model, streamed):
    for text, found in zip(
        _texts(), _record(model, _texts(), accumulate=Blocks, streamed=streamed)
    ):
        _agrees(trace.join(found.accumulated), _expected(model, text))
        assert found.info == found.accumulated.info.__class__(
            **dataclasses.asdict(found.accumulated.info)
            | {"near_ties": found.info.near_ties, "layers": found.info.layers}
        )
        assert (found.info.domain, found.info.num_tokens) == (text.domain, len(text.tokens))
        assert found.info.model == "tiny" and found.info.layers == (0, 1, 2)


def test_streamed_and_resident_give_the_same_bits_on_disk(model, tmp_path):
    once = _record(model, _texts(), tmp_path / "resident", streamed=False)
    layer = _record(model, _texts(), tmp_path / "streamed", streamed=True)
    direct = _record(model, _texts(), accumulate=Blocks, streamed=False)
    for a, b, c in zip(once, layer, direct, strict=True):
        assert a.info == b.info == c.info
        _same(models.whole(a.trace), models.whole(b.trace))
        exact = trace.join(c.accumulated)
        np.testing.assert_allclose(models.whole(a.trace).weights, exact.weights, rtol=HALF)
    assert not os.path.exists(tmp_path / "streamed.scratch")
