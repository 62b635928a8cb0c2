"""Experts matched, and compared among themselves, by the weights in their files."""

import json

import jax
import jax.numpy as jnp
import numpy as np

import olmoe_jax
from olmoe_jax import checkpoints, config
from olmoe_jax.analysis import analyses, expert_weights, suites
from tests.analysis import models
from tests.porting import tiny


def _save(folder, steps):
    """A run with parameters of each step."""
    run = config.Config(model=tiny.MODEL, data=config.DataConfig(sequence_length=16))
    with checkpoints.Checkpoints(folder, run) as kept:
        for step, params in steps.items():
            kept.save_params(step, jax.tree.map(jnp.asarray, params))
    return folder


def _renumbered(params, order):
    params = jax.tree.map(np.array, params)
    moe = params["layers"]["block_0"]["moe"]
    for name in ("w_gate", "w_up", "w_down"):
        moe[name] = moe[name][:, order]
    return params


def test_the_arrays_are_those_of_the_loaded_model(tmp_path):
    folder = models.folder(tmp_path / "m")
    _, params = olmoe_jax.load(folder)
    experts = expert_weights.open_experts(folder)
    assert experts.layers == (0, 1, 2) and experts.num_experts == 5
    for row, layer in enumerate(experts):
        for name, array in layer.items():
            want = np.asarray(params["layers"]["block_0"]["moe"][name][row])
            np.testing.assert_array_equal(array.astype(np.float32), want)
    assert experts.is_comparable(expert_weights.open_experts(folder))
    wider = expert_weights.open_experts(models.folder(tmp_path / "wide", d_ff=11))
    assert not experts.is_comparable(wider)


def test_renumbered_experts_are_matched_from_the_files(tmp_path):
    order, params = np.array([3, 0, 4, 1, 2]), tiny.random_params()
    one = _save(tmp_path / "one", {2: params})
    two = _save(tmp_path / "two", {2: _renumbered(params, order)})
    found = analyses._by_weights({"one": one, "two": two}, "one", "two")
    for layer in found.layers:
        np.testing.assert_array_equal(layer.match, np.argsort(order))
        np.testing.assert_allclose(layer.mean.value, 1, rtol=1e-5)
    assert analyses._by_weights({"one": one}, "one", "two") is None


def test_copies_that_diverge_over_checkpoints_are_told(tmp_path):
    end = tiny.random_params()
    start = jax.tree.map(np.array, end)
    moe = start["layers"]["block_0"]["moe"]
    for name in ("w_gate", "w_up", "w_down"):
        moe[name][:] = moe[name][:, :1]
    folder = _save(tmp_path / "upcycled", {0: start, 7: end})
    said = analyses.write_siblings(suites.checkpoints_of(folder), tmp_path / "out")
    assert "At step0-tokens0K it was 1." in said[0]
    content = json.loads((tmp_path / "out" / "expert_siblings.json").read_text())
    first, last = content["checkpoints"]
    assert (first["name"], last["name"]) == ("step0-tokens0K", suites.one(folder).name)
    moe = end["layers"]["block_0"]["moe"]
    flat = np.concatenate(
        [np.asarray(moe[n])[1].reshape(5, -1) for n in ("w_gate", "w_up", "w_down")], axis=1
    )
    flat = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    np.testing.assert_allclose(last["layers"]["1"]["matrix"], flat @ flat.T, atol=1e-4)
    assert first["layers"]["1"]["mean"] > 0.999
