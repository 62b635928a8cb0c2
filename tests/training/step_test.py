import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmoe_jax import grouped_matmul, losses
from olmoe_jax.model import transformer
from olmoe_jax.training import step as step_lib
from tests import oracles
from tests.training import tiny


def test_masked_windows_stay_in_the_denominator_if_asked():
    batch = tiny.random_batch()
    full = tiny.gradient(tiny.CONFIG, batch=batch)[1].cross_entropy
    counted = tiny.gradient(tiny.make_config(losses={"count_masked": True}), batch=batch)[
        1
    ].cross_entropy
    targets = batch["loss_mask"][:, 1:].sum()
    assert float(counted) == pytest.approx(
        float(full) * targets / (tiny.BATCH * tiny.LENGTH), rel=1e-5
    )


def test_steps_compile_once_and_their_metrics_speak_of_the_parameters_before_the_update():
    config = tiny.make_config(
        training={"num_steps": 7}, losses={"load_balancing_convention": "huggingface"}
    )
    state, metrics, run = tiny.after_steps(config, "data 8", 3)
    assert run._cache_size() == 1
    assert int(state["step"]) == 3
    batch, params = tiny.random_batch(), tiny.random_params()
    want = oracles.transformer(params, tiny.MODEL, batch["tokens"], mask=batch["token_mask"])
    nats, count = oracles.cross_entropy(want.logits, batch["tokens"], batch["loss_mask"])
    first, mask = metrics[0], batch["token_mask"]
    tiny.close(first["loss"], nats / count)
    balance = oracles.load_balancing(want.router_logits, want.expert_ids, mask, "huggingface", 0)
    tiny.close(
        first["load_balancing_loss"], balance / tiny.MODEL.num_experts_per_token
    )  # 1.0 is balanced
    tiny.close(first["router_z_loss"], oracles.router_z(want.router_logits, mask))
    counts = np.array([[(ids == e).sum() for e in range(8)] for ids in want.expert_ids])
    tiny.close(first["load"], counts / counts.sum(-1, keepdims=True))
    tiny.close(first["layer_rms"], want.layer_rms)
    assert metrics[2]["loss"] < metrics[1]["loss"] < metrics[0]["loss"]


@pytest.mark.parametrize("group", [0, 2])
def test_windows_that_are_all_masked_give_loss_zero_and_a_finite_state(group):
    config = tiny.make_config(
        losses={"load_balancing_group": group}, training={"micro_batches": 4 if group == 0 else 1}
    )
    batch = tiny.random_batch(config)
    nothing = {name: np.zeros_like(x) for name, x in batch.items()}
    state, (metrics,), _ = tiny.after_steps(config, "one device", 1, nothing)
    for name in ("loss", "load_balancing_loss", "router_z_loss", "gradient_norm"):
        assert metrics[name] == 0, name
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(state)))


def test_bf16_gradients_are_finite_float32_and_near_those_of_float32():
    want, parts = tiny.gradient(tiny.CONFIG)
    got, rough = tiny.gradient(tiny.make_config(model={"dtype": "bfloat16"}))
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {np.dtype(np.float32)}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(got))
    assert float(rough.cross_entropy) == pytest.approx(float(parts.cross_entropy), rel=0.02)
    flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (got, want)]
    cosine = flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1])
    assert cosine > 0.98


# The auxiliary losses' gradient


def _auxiliary(weights):
    return tiny.make_config(
        losses={"load_balancing_weight": weights[0], "router_z_weight": weights[1]},
        training={"micro_batches": 4, "batch_size": 16},
    )


def _router(tree):
    return np.asarray(tree["layers"]["block_0"]["moe"]["router"], np.float64)


def _objective_and_choices(config, params):
    """The objective that the step differentiates, and the choices, from the NumPy model."""
    batch = tiny.random_batch(config)
    out = oracles.transformer(params, tiny.MODEL, batch["tokens"], mask=batch["token_mask"])
    nats, count = oracles.cross_entropy(out.logits, batch["tokens"], batch["loss_mask"])
    balance = oracles.load_balancing(
        out.router_logits, out.expert_ids, batch["token_mask"], "olmoe", 0
    )
    z = oracles.router_z(out.router_logits, batch["token_mask"])
    weights = config.losses
    total = nats / count + weights.load_balancing_weight * balance + weights.router_z_weight * z
    return total, out.expert_ids


def _with_router(params, router):
    layers = params["layers"]
    block = layers["block_0"]
    return params | {"layers": {"block_0": block | {"moe": block["moe"] | {"router": router}}}}


@pytest.mark.parametrize("weights", [(2.0, 0.0), (0.0, 0.3), (2.0, 0.3)])
def test_gradient_of_the_whole_step_equals_finite_differences(weights):
    """Along a direction of the router, in float64, with no choice flipped between the ends."""
    config = _auxiliary(weights)
    gradient, _ = tiny.gradient(config)
    params, step = tiny.random_params(), 1e-6
    direction = np.random.default_rng(0).normal(size=_router(params).shape)
    ends = [
        _objective_and_choices(
            config, _with_router(params, _router(params) + sign * step * direction)
        )
        for sign in (1, -1)
    ]
    np.testing.assert_array_equal(ends[0][1], ends[1][1])
    slope = (ends[0][0] - ends[1][0]) / (2 * step)
    assert float(np.sum(_router(gradient) * direction)) == pytest.approx(slope, rel=1e-2)


def test_zeroing_the_weight_of_one_auxiliary_loss_changes_the_gradient():
    both, without_balance, without_z = (
        _router(tiny.gradient(_auxiliary(weights))[0])
        for weights in ((2.0, 0.3), (0.0, 0.3), (2.0, 0.0))
    )
    size = np.abs(both).max()
    for a, b in itertools.combinations((both, without_balance, without_z), 2):
        assert np.abs(a - b).max() > 0.01 * size


def test_expert_choice_logs_the_load_balancing_loss_but_does_not_learn_from_it():
    changes = {"model": {"router": "expert_choice"}, "training": {"batch_size": 16}}
    with_weight, without = (
        tiny.gradient(tiny.make_config(**changes, losses={"load_balancing_weight": weight}))
        for weight in (2.0, 0.0)
    )
    np.testing.assert_array_equal(_router(with_weight[0]), _router(without[0]))
    assert with_weight[1].load_balancing > 0.5


def test_the_counting_pass_is_made_only_where_it_is_needed():
    needed = tiny.make_config(training={"micro_batches": 4})
    assert step_lib.needs_counting_pass(needed)
    for changes in (
        {"training": {"micro_batches": 1}},
        {"losses": {"load_balancing_group": 2}},
        {"losses": {"load_balancing_weight": 0.0}},
        {"model": {"num_experts": 0}},
    ):
        assert not step_lib.needs_counting_pass(
            tiny.make_config(**({"training": {"micro_batches": 4}} | changes))
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_state_keeps_its_dtypes_and_its_memory(dtype):
    """Parameters and moments of a bfloat16 state stay so, and every leaf is updated in place."""
    config = tiny.make_config(model={"dtype": dtype})
    model = transformer.Transformer(config.model)
    state = step_lib.init_state(jax.random.key(0), config=config)
    is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)  # noqa: E731
    state = jax.tree.map(lambda x: x.astype(dtype) if is_float(x) else x, state)
    step = jax.jit(
        functools.partial(step_lib.train_step, model=model, config=config), donate_argnums=0
    )
    batch = jax.tree.map(jnp.asarray, tiny.random_batch())
    compiled = step.lower(state, batch).compile()
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    assert compiled.memory_analysis().alias_size_in_bytes == size
    before = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    new, _ = compiled(state, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == before


# Learning


@pytest.mark.parametrize("backend", ["dense", "capacity", "loop", "kernel"])
def test_a_repeated_pattern_is_learnt(backend):
    if backend == "kernel" and (reason := grouped_matmul.missing(backend)):
        pytest.skip(reason)
    config = tiny.make_config(
        model={"expert_backend": backend},
        losses={"load_balancing_weight": 0.01, "router_z_weight": 0.001},
        optimizer={"learning_rate": 0.02, "schedule": "constant"},
        training={"batch_size": 8, "num_steps": 30},
    )
    pattern = np.random.default_rng(0).permutation(31)
    rows = (np.arange(8)[:, None] * 3 + np.arange(tiny.LENGTH)) % 31
    every = np.ones((8, tiny.LENGTH), bool)
    batch = {"tokens": pattern[rows].astype(np.int32), "token_mask": every, "loss_mask": every}
    _, metrics, _ = tiny.after_steps(config, "one device", 30, batch)
    losses_seen = [float(m["loss"]) for m in metrics]
    assert losses_seen[-1] < 0.2 * losses_seen[0]


def test_validation_sums_equal_numpy():
    config, batch = (
        tiny.make_config(training={"batch_size": 16}),
        tiny.random_batch(tiny.make_config(training={"batch_size": 16})),
    )
    batch["domains"] = (
        np.random.default_rng(5).integers(0, 3, batch["tokens"].shape).astype(np.uint8)
    )
    run = jax.jit(
        functools.partial(
            step_lib.validation_step, model=tiny.make_model(config), config=config, num_domains=3
        )
    )
    sums = run(tiny.random_params(), batch)
    want = oracles.transformer(
        tiny.random_params(), tiny.MODEL, batch["tokens"], mask=batch["token_mask"]
    )
    for domain in range(3):
        in_domain = batch["loss_mask"] & (batch["domains"] == domain)
        nats, count = oracles.cross_entropy(want.logits, batch["tokens"], in_domain)
        tiny.close(sums["loss"][domain], nats)
        assert sums["targets"][domain] == count
    tokens = batch["token_mask"].sum()
    assert sums["tokens"] == tokens
    tiny.close(sums["router_z"] / tokens, oracles.router_z(want.router_logits, batch["token_mask"]))
    balance = losses.load_balancing_loss(
        sums["statistics"], convention="olmoe", num_experts_per_token=3
    )
    tiny.close(
        balance,
        oracles.load_balancing(
            want.router_logits, want.expert_ids, batch["token_mask"], "olmoe", 0
        ),
    )
