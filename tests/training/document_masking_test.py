"""Attention that stays inside documents: the model, the step on any mesh, validation, the loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmoe_jax import checkpoints
from olmoe_jax import config as config_lib
from olmoe_jax.data import pipeline
from olmoe_jax.model import transformer
from olmoe_jax.studies import documents as documents_lib
from olmoe_jax.studies import results
from olmoe_jax.training import loop, validation
from olmoe_jax.training import step as step_lib
from tests import oracles
from tests.training import tiny

FP32 = 2e-5  # order of summation, and the rotation at other positions
LENGTH = 13
BORDERS = ((5, 6), (9,))  # of two windows: documents of 5, 1, 7 tokens and of 9, 4
MODELS = {
    "MoE": {},
    "sliding window, grouped heads": dict(sliding_window=3, num_heads=4, num_kv_heads=2),
    "dense, per-head norm": dict(num_experts=0, qk_norm_per_head=True),
}


def _model_config(**changes):
    return config_lib.ModelConfig(
        **dict(
            vocab_size=29, max_length=LENGTH, num_layers=2, d_model=16, num_heads=2,
            num_kv_heads=2, d_ff=6, num_experts=5, num_experts_per_token=2, init_std=0.3,
        ) | changes
    )  # fmt: skip


def _packed():
    """(tokens, documents), [2, LENGTH]; no document repeats a token of another in its window."""
    rng = np.random.default_rng(3)
    tokens = np.stack([rng.permutation(29)[:LENGTH] for _ in BORDERS]).astype(np.int32)
    numbers = [np.searchsorted(b, np.arange(LENGTH), side="right") for b in BORDERS]
    return tokens, np.stack(numbers).astype(np.int32) + 40


def _params(config):
    tokens, _ = _packed()
    return oracles.random_params(transformer.Transformer(config), tokens)


@functools.partial(jax.jit, static_argnums=0)
def _logits(config, params, tokens, segment_ids=None, positions=None):
    model = transformer.Transformer(config)
    out = model.apply({"params": params}, tokens, segment_ids=segment_ids, positions=positions)
    return out.logits


@pytest.mark.parametrize("kept_positions", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_a_packed_window_is_its_documents_run_alone(name, kept_positions):
    """Also from position 0: what counts is the distance."""
    config = _model_config(**MODELS[name])
    params, (tokens, documents) = _params(config), _packed()
    packed = _logits(config, params, tokens, documents)
    for row in range(len(tokens)):
        for number in np.unique(documents[row]):
            places = np.flatnonzero(documents[row] == number)
            positions = places[None] if kept_positions else None
            alone = _logits(config, params, tokens[row][None, places], None, positions)
            tiny.close(packed[row, places], alone[0], FP32)
    assert np.abs(packed - _logits(config, params, tokens)).max() > 1e-2


def test_no_gradient_crosses_a_border():
    """Exactly none, in the embeddings of other documents' tokens, through two layers."""
    config = _model_config()
    params, (tokens, documents) = _params(config), _packed()
    model = transformer.Transformer(config)

    def loss(embedding, segment_ids):
        changed = {**params, "embedding": embedding}
        out = model.apply({"params": changed}, tokens[:1], segment_ids=segment_ids)
        return jax.nn.log_softmax(out.logits[0, 10])[tokens[0, 11]]

    gradient = jax.jit(jax.grad(loss))
    reached = np.abs(gradient(params["embedding"], documents[:1])).max(-1) > 0
    np.testing.assert_array_equal(np.flatnonzero(reached), np.sort(tokens[0, 6:11]))
    everywhere = np.abs(gradient(params["embedding"], None)).max(-1) > 0
    np.testing.assert_array_equal(np.flatnonzero(everywhere), np.sort(tokens[0, :11]))


def _run(**sections):
    return tiny.make_config(data={"mask_documents": True}, **sections)


def _batch():
    """A batch of uneven rows, cut into documents; padding is one of its own, as in the data."""
    batch = tiny.random_batch()
    rng = np.random.default_rng(5)
    numbers = 7 + np.cumsum(rng.random(batch["tokens"].shape) < 0.3, axis=1)
    documents = np.where(batch["token_mask"], numbers, -1).astype(np.int32)
    return batch | {"documents": documents}


def _oracle(batch):
    return oracles.transformer(
        tiny.random_params(), tiny.MODEL, batch["tokens"], mask=batch["token_mask"],
        segments=batch["documents"],
    )  # fmt: skip


def test_a_step_and_validation_equal_numpy():
    """NumPy's attention has the mask of blocks along the diagonal."""
    batch = _batch()
    want = _oracle(batch)
    nats, count = oracles.cross_entropy(want.logits, batch["tokens"], batch["loss_mask"])
    _, parts = tiny.gradient(_run(), batch=batch)
    tiny.close(parts.cross_entropy, nats / count)
    tiny.close(parts.router_z, oracles.router_z(want.router_logits, batch["token_mask"]))
    batch = batch | {"domains": np.zeros(batch["tokens"].shape, np.uint8)}
    step = functools.partial(
        step_lib.validation_step, model=tiny.make_model(_run()), config=_run(), num_domains=1
    )
    sums = jax.jit(step)(tiny.random_params(), batch)
    tiny.close(sums["loss"][0], nats)
    assert sums["targets"][0] == count
    _, crossing = tiny.gradient(tiny.CONFIG, batch=batch)
    assert abs(float(crossing.cross_entropy) - nats / count) > 1e-3


@pytest.mark.parametrize(
    ("mesh", "sections"),
    [
        ("one device", dict(training={"micro_batches": 4})),
        ("fsdp 2 × expert 2 × tensor 2", dict(model={"remat": True})),
        ("data 8", {}),
    ],
)
def test_meshes_micro_batches_and_remat_do_not_change_the_gradient(mesh, sections):
    want, _ = tiny.gradient(_run(), batch=_batch())
    got, _ = tiny.gradient(_run(**sections), mesh, batch=_batch())
    jax.tree.map(tiny.close, got, want)


def _program(config, batch):
    step = functools.partial(
        step_lib.loss_and_gradient, model=tiny.make_model(config), config=config
    )
    return jax.jit(step).lower(tiny.random_params(), batch).as_text()


def test_without_it_the_program_does_not_know_of_documents():
    batch = _batch()
    fields = step_lib.training_fields(tiny.CONFIG)
    plain = _program(tiny.CONFIG, {name: batch[name] for name in fields})
    assert "documents" not in fields and "documents" in step_lib.training_fields(_run())
    i32 = f"tensor<{tiny.BATCH}x{tiny.LENGTH}xi32>"
    assert plain.split("\n")[1].count(i32) == 1  # the tokens
    masked = _program(_run(), {name: batch[name] for name in step_lib.training_fields(_run())})
    assert masked.split("\n")[1].count(i32) == 2


@pytest.mark.parametrize("in_document", [False, True])
def test_a_shuffled_context_is_one_that_the_model_sees(in_document):
    batch = _batch()
    batch = {name: x[: tiny.BATCH // 4] for name, x in batch.items()}  # rows without padding
    rng = np.random.default_rng(0)
    changed = validation._one_target(batch, rng, shuffle=True, in_document=in_document)
    moved = 0
    for row, documents in enumerate(batch["documents"]):
        if not changed["loss_mask"][row].any():
            continue
        target = int(np.argmax(changed["loss_mask"][row]))
        seen = np.arange(tiny.LENGTH) < target
        if in_document:
            seen &= documents == documents[target - 1]
        old, new = batch["tokens"][row], changed["tokens"][row]
        np.testing.assert_array_equal(np.sort(new[seen]), np.sort(old[seen]))
        np.testing.assert_array_equal(new[~seen], old[~seen])
        moved += (new != old).sum()
    assert moved > 0


def test_a_run_trains_and_validates_with_it(make_run, tmp_path):
    """The last validation, and the losses by document, against `model.apply`."""
    quiet = dict(announce=lambda line: None, devices=jax.devices()[:1])
    run = make_run(data=dict(mask_documents=True), training=dict(num_steps=3))
    loop.train(run, tmp_path, **quiet)
    data = pipeline.open(run.data.path)
    documents_lib.measure(tmp_path, run, data, devices=jax.devices()[:1])
    kept = checkpoints.list_checkpoints(tmp_path)
    params = jax.tree.map(jnp.asarray, checkpoints.read_params(kept[-1][1]))
    total = count = 0.0
    for batch in pipeline.validation_batches(data, num_windows=11, batch_size=8):
        logits = _logits(run.model, params, batch["tokens"], batch["documents"])
        nats, targets = oracles.cross_entropy(
            np.asarray(logits, np.float64), batch["tokens"], batch["loss_mask"]
        )
        total, count = total + nats, count + targets
    measured = loop.train(run, tmp_path, **quiet).record["validation/loss"]
    assert measured == pytest.approx(total / count, rel=1e-5)
    found = results.read_documents(tmp_path)
    assert found["nats"].sum() == pytest.approx(total, rel=1e-5)
