"""Biases of loss-free balancing: the update against NumPy, on meshes, through a whole run."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from olmoe_jax import checkpoints, loading
from olmoe_jax.training import balancing, loop, optimizer
from olmoe_jax.training import step as step_lib
from tests import oracles
from tests.training import tiny

RATE = 0.1  # in a few steps some experts overshoot
GENTLE = 0.005
BIASED = {
    "model": {"router_bias": True},
    "losses": {"load_balancing_weight": 0.0, "router_bias_rate": RATE},
}


def _bias(tree, block="block_0"):
    return np.asarray(tree["layers"][block]["moe"]["router_bias"])


_random_params = tiny.random_params


def _plain_params(model=None):
    """Random parameters with unbalanced routing and biases of zero."""
    params = jax.tree.map(np.array, _random_params(model or tiny.make_config(**BIASED).model))
    params["layers"]["block_0"]["moe"]["router_bias"][:] = 0
    return params


def test_an_overloaded_expert_becomes_dearer_and_nothing_else_moves():
    rng = np.random.default_rng(0)
    layers = {"moe": {"router_bias": np.float32([[0.5, 0, 0, 0], [0, 0, 0, -1]]),
                      "router": rng.normal(size=(2, 3, 4))}}  # fmt: skip
    load = np.float32([[6, 2, 2, 2], [3, 3, 3, 3]])
    moved = balancing.move_biases({"layers": {"block_0": layers}}, load, 0.25)
    moe = moved["layers"]["block_0"]["moe"]
    np.testing.assert_array_equal(moe["router_bias"], [[0.25, 0.25, 0.25, 0.25], [0, 0, 0, -1]])
    np.testing.assert_array_equal(moe["router"], layers["moe"]["router"])


@functools.cache
def _numpy_steps(steps):
    """Biases after each step on one batch whose other parameters stay as they are, by loops."""
    config, params, seen = tiny.make_config(**BIASED), _plain_params(), []
    batch = tiny.random_batch()
    for _ in range(steps):
        out = oracles.transformer(params, config.model, batch["tokens"], mask=batch["token_mask"])
        bias = _bias(params).astype(np.float64)
        for layer, ids in enumerate(out.expert_ids):
            load = np.array([(ids == e).sum() for e in range(8)])
            for e in range(8):
                bias[layer, e] += RATE * np.sign(load.mean() - load[e])
        params["layers"]["block_0"]["moe"]["router_bias"] = bias
        seen.append(bias)
    return seen


@pytest.mark.parametrize(
    ("mesh", "micro_batches"),
    [("one device", 1), ("data 8", 4), ("fsdp 2 × expert 2 × tensor 2", 1)],
)
def test_steps_move_biases_as_numpy_does_on_every_mesh(mesh, micro_batches, monkeypatch):
    """The rate is too small for any other parameter to move; biases are those of NumPy's loop."""
    config = tiny.make_config(
        **BIASED, training={"micro_batches": micro_batches}, optimizer={"learning_rate": 1e-30}
    )
    monkeypatch.setattr(tiny, "random_params", _plain_params)
    state, metrics, _ = tiny.after_steps(config, mesh, 4)
    np.testing.assert_allclose(_bias(state["params"]), _numpy_steps(4)[-1], atol=1e-6)
    assert len(np.unique(_bias(state["params"]))) > 2
    assert not np.any(_bias(state["opt_state"][0].mu)) and metrics[0]["load"].max() > 2 / 8


def test_no_gradient_and_no_decay_reach_a_bias():
    config = tiny.make_config(**BIASED)
    params = tiny.random_params(config.model)
    gradient, _ = tiny.gradient(config)
    np.testing.assert_array_equal(_bias(gradient), np.zeros((2, 8)))
    assert not _bias(optimizer.decay_mask(params, config.optimizer)).any()


def test_a_skewed_router_is_balanced_without_an_auxiliary_loss(monkeypatch):
    """The same steps without a rate leave the load as skewed as it was."""
    monkeypatch.setattr(tiny, "random_params", _plain_params)
    excess = {}
    for rate in (GENTLE, 0.0):
        config = tiny.make_config(
            model={"router_bias": True}, optimizer={"learning_rate": 1e-4},
            losses={"load_balancing_weight": 0.0, "router_bias_rate": rate},
        )  # fmt: skip
        _, metrics, _ = tiny.after_steps(config, "one device", 150)
        busiest = [8 * float(m["load"].max()) - 1 for m in metrics]  # 0 is balanced
        excess[rate] = busiest[0], np.mean(busiest[-10:])
    assert excess[GENTLE][0] == excess[0.0][0] > 1
    assert excess[GENTLE][1] < 0.4 * excess[0.0][1]


def test_layers_that_share_their_experts_have_biases_of_their_own():
    shared = {"router_bias": True, "share_experts_across_layers": True}
    config = tiny.make_config(**BIASED | {"model": shared})
    before = _bias(tiny.random_params(config.model))
    state, (metrics,), _ = tiny.after_steps(config, "one device", 1)
    step = RATE * np.sign(1 / 8 - metrics["load"])
    assert step.shape == (2, 8) and (step[0] != step[1]).any()
    np.testing.assert_allclose(_bias(state["params"]), before + step, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "block", "dtype"),
    [
        ({"moe_every": 2}, "block_1", "float32"),
        ({"share_experts_across_layers": True}, "block_0", "bfloat16"),
    ],
)
def test_biases_are_kept_with_every_checkpoint_and_a_resumed_run_has_the_same(
    tmp_path, make_run, model, block, dtype
):
    """In bfloat16 kept checkpoints round a bias by up to 1/256; where a run resumes it is exact."""
    run = make_run(
        model={"router_bias": True} | model, training={"num_steps": 6},
        checkpoint={"interval": 3, "dtype": dtype},
    )  # fmt: skip
    quiet = {"announce": lambda line: None}
    loop.train(run, tmp_path / "straight", **quiet)
    part = dataclasses.replace(run, training=dataclasses.replace(run.training, num_steps=3))
    loop.train(part, tmp_path / "parts", **quiet)
    loop.train(run, tmp_path / "parts", **quiet)
    found, exact = [], []
    for workdir in ("straight", "parts"):
        kept = [checkpoints.read_params(path) for _, path in
                checkpoints.list_checkpoints(tmp_path / workdir)]  # fmt: skip
        found.append([np.float32(p["layers"][block]["moe"]["router_bias"]) for p in kept])
        exact.append(_bias(_last_state(tmp_path / workdir, run)["params"], block))
    rounding = 1e-4 if dtype == "float32" else 1 / 256
    assert [np.abs(b).max() for b in found[0]] == pytest.approx([0, 3e-3, 6e-3], rel=rounding)
    assert np.abs(exact[0]).max() == pytest.approx(6e-3, rel=1e-4)
    np.testing.assert_array_equal(*exact)
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)
    loaded, params = loading.load(tmp_path / "parts")
    assert loaded.config.router_bias
    np.testing.assert_array_equal(params["layers"][block]["moe"]["router_bias"], found[0][-1])


def _last_state(workdir, config):
    """The train state that a run would resume from."""
    init = functools.partial(step_lib.init_state, config=config)
    abstract = jax.eval_shape(init, jax.random.key(0))
    steps = {checkpoints.parse_name(path.name): path for path in (workdir / "resume").iterdir()}
    newest = steps[max(step for step in steps if step is not None)]
    return checkpoints.read_state(newest, abstract, config.model)
