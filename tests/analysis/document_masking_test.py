"""A model that was trained with attention inside documents is recorded with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmoe_jax import checkpoints
from olmoe_jax import config as config_lib
from olmoe_jax.analysis import recording, trace
from olmoe_jax.model import transformer
from tests import oracles
from tests.analysis import models

MODEL = config_lib.ModelConfig(
    vocab_size=models.VOCAB, max_length=models.LENGTH, num_layers=2, d_model=16, num_heads=2,
    num_kv_heads=2, d_ff=6, num_experts=5, num_experts_per_token=2,
)  # fmt: skip


@pytest.mark.parametrize("streamed", [False, True])
def test_recording_follows_the_runs_setting(streamed, tmp_path):
    text = models.text("a", 50, documents=7)
    model = transformer.Transformer(MODEL)
    params = jax.tree.map(jnp.asarray, oracles.random_params(model, np.zeros((1, 2), np.int32)))
    found = {}
    for masked in (False, True):
        data = config_lib.DataConfig(sequence_length=models.LENGTH, mask_documents=masked)
        workdir = tmp_path / str(masked)
        with checkpoints.Checkpoints(workdir, config_lib.Config(model=MODEL, data=data)) as saver:
            saver.save_params(0, params)
        (recorded,) = recording.record(
            workdir, [text], accumulate=models.Blocks, streamed=streamed, announce=lambda line: None
        )
        found[masked] = trace.join(recorded.accumulated)
    tokens, real = text.windows(0, text.num_windows)
    documents = np.full(tokens.shape, -1, np.int32)
    documents[real] = text.documents
    for masked, segments in ((False, None), (True, documents)):
        routing = model.apply(
            {"params": params}, tokens, segment_ids=segments, token_mask=real, return_routing=True
        ).routing
        want = np.asarray(routing.expert_ids)[:, real].swapaxes(0, 1)
        np.testing.assert_array_equal(found[masked].expert_ids, want)
    assert (found[True].expert_ids != found[False].expert_ids).any()
    assert not np.allclose(found[True].losses, found[False].losses, equal_nan=True)
