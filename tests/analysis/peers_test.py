"""Recorded routing against the routers of transformers."""

import numpy as np
import pytest

from olmoe_jax.analysis import recording, texts, trace
from tests.analysis import models
from tests.porting import peers, tiny

FP32 = 1e-5  # order of summation over three layers, of weights below 1


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        "OLMoE, plain",
        "Mixtral, plain",
        pytest.param("OLMoE, all together", marks=pytest.mark.slow),
        pytest.param("FlexOlmo, plain", marks=pytest.mark.slow),
        pytest.param("Qwen3-MoE, plain", marks=pytest.mark.slow),
    ],
)
def test_choices_weights_and_losses_are_those_of_transformers(case, streamed, tmp_path):
    theirs = peers.save(case, tmp_path / "model", max_shard_size="20KB")
    tokens = peers.tokens(b=3, length=17)
    logits, router_logits = peers.run(theirs, tokens)
    text = texts.Text("random", tokens.reshape(-1), np.zeros(tokens.size, np.int32), 17)
    (found,) = recording.record(
        tmp_path / "model", [text], accumulate=models.Blocks, streamed=streamed,
        tokens_per_batch=34, announce=tiny.quiet,
    )  # fmt: skip
    block = trace.join(found.accumulated)
    scores = np.moveaxis(router_logits.reshape(peers.LAYERS, -1, peers.EXPERTS), 0, 1)
    probs = np.exp(scores.astype(np.float64))
    probs /= probs.sum(axis=-1, keepdims=True)
    ids = np.argsort(-probs, axis=-1, kind="stable")[..., : peers.TOP_K]
    np.testing.assert_array_equal(block.expert_ids, ids)
    np.testing.assert_allclose(block.weights, np.take_along_axis(probs, ids, -1), atol=FP32)
    flat = logits.reshape(-1, peers.VOCAB).astype(np.float64)
    np.testing.assert_array_equal(block.predicted_ids, flat.argmax(axis=-1))
    following = tokens.reshape(-1)[1:]
    losses = np.log(np.exp(flat).sum(-1))[:-1] - flat[np.arange(len(following)), following]
    np.testing.assert_allclose(block.losses[:-1], losses, rtol=2e-5)
    assert np.isnan(block.losses[-1])
