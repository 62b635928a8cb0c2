import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmoe_jax.benchmarking import moe_work
from olmoe_jax.benchmarking import rounds as rounds_lib

SHAPE = {"d_model": 17, "d_ff": 5, "num_experts": 7, "num_experts_per_token": 3}
COUNT = 67  # tokens; more than the rows that BALANCED compares
ROUTINGS = (moe_work.BALANCED, moe_work.TO_FEW)


def make(routing, dtype="float32", backend="loop"):
    """(config, params, tokens, truth)."""
    config = moe_work.make_config(dtype=dtype, expert_backend=backend, **SHAPE)
    params = moe_work.make_params(config)
    tokens = moe_work.make_tokens(config, params["router"], count=COUNT, routing=routing)
    params = jax.tree.map(jnp.asarray, params)
    return config, params, tokens, moe_work.truth(config, params, tokens, routing=routing)


def outputs_of(config, params, tokens):
    layer = moe_work.make_layer(config)
    return jax.device_get(layer(params, jnp.asarray(tokens.x), jnp.asarray(tokens.d_y)))


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", moe_work.TOLERANCE)
def test_our_layer_is_right_and_chooses_what_the_tokens_were_made_for(dtype, routing):
    config, params, tokens, expected = make(routing, dtype)
    assert params["router"].dtype == tokens.x.dtype == jnp.dtype(dtype)
    sample = moe_work.contestant(config, params, tokens, expected, seconds=0)()
    assert sample.values["wrong_choices"] == 0
    assert sample.values["error"] <= moe_work.TOLERANCE[dtype]
    assert sample.seconds > 0


def test_routings():
    _, _, few, _ = make(moe_work.TO_FEW)
    assert set(few.expert_ids.flat) == {0, 1, 2}
    _, _, balanced, _ = make(moe_work.BALANCED)
    assert np.all(np.diff(balanced.expert_ids) > 0)  # no expert twice
    loads = np.bincount(balanced.expert_ids.flat, minlength=7)
    assert loads.sum() == 3 * COUNT and loads.min() > 15 and len(set(loads)) > 1


@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_truth_is_what_the_dense_backend_says_of_the_whole_layer(routing):
    config, params, tokens, expected = make(routing, backend="dense")
    outputs = outputs_of(config, params, tokens)
    assert expected.error(expected.pick(outputs)) < 1e-6
    assert set(expected.values) >= {"y", "d_x", *moe_work.WEIGHTS}
    assert ("router" in expected.values) == (routing == moe_work.TO_FEW)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_output_that_is_wrong_is_noticed(routing):
    config, params, tokens, expected = make(routing)
    outputs = outputs_of(config, params, tokens)
    for name in expected.values:
        changed = np.array(outputs[name])
        changed[0, 0] += 0.01 * np.abs(changed).max()
        assert expected.error(expected.pick(outputs | {name: changed})) > 2e-3, name
        changed[0, 0] = np.nan
        assert expected.error(expected.pick(outputs | {name: changed})) == moe_work.BEYOND


def test_a_gradient_for_an_expert_that_nobody_chose_is_noticed():
    config, params, tokens, expected = make(moe_work.TO_FEW)
    outputs = outputs_of(config, params, tokens)
    changed = np.array(outputs["w_down"])
    changed[3] += 0.01 * np.abs(changed).max()
    assert expected.error(expected.pick(outputs | {"w_down": changed})) > 2e-3


def test_dropped_tokens_are_noticed():
    config, params, tokens, expected = make(moe_work.TO_FEW)
    dropping = dataclasses.replace(config, expert_backend="capacity")
    sample = moe_work.contestant(dropping, params, tokens, expected, seconds=0)()
    assert sample.values["error"] > 0.1


def test_a_choice_of_other_experts_is_counted():
    config, params, tokens, expected = make(moe_work.BALANCED)
    other = tokens.expert_ids.copy()
    other[5] = (other[5] + 1) % 7
    other[5].sort()
    tokens = dataclasses.replace(tokens, expert_ids=other)
    sample = moe_work.contestant(config, params, tokens, expected, seconds=0)()
    assert sample.values["wrong_choices"] == 1


def test_right_only_if_right_in_every_round():
    def found(*values):
        samples = tuple(rounds_lib.Sample(1.0, v) for v in values)
        return rounds_lib.Rounds({"ours": samples}, (), 0, 0)

    good, bad = {"error": 1e-6, "wrong_choices": 0}, {"error": 1e-3, "wrong_choices": 0}
    assert moe_work.is_right(found(good, good), "ours", "float32")
    assert not moe_work.is_right(found(good, bad, good), "ours", "float32")
    assert moe_work.is_right(found(good, bad), "ours", "bfloat16")
    assert not moe_work.is_right(found(good, good | {"wrong_choices": 1}), "ours", "float32")
    assert moe_work.is_right(found({"error": 1e-6}), "ours", "float32")  # a peer shows no choices


def test_measuring_calls_until_the_time_is_up_and_at_least_once(monkeypatch):
    clock, calls = [0.0], []

    def call():
        calls.append(clock[0])
        clock[0] += 0.3 if len(calls) == 2 else 0.4
        return jnp.float32(len(calls))

    monkeypatch.setattr(moe_work.time, "monotonic", lambda: clock[0])
    median, last = moe_work.measure(call, seconds=1.0)
    assert (round(median, 6), float(last), len(calls)) == (0.4, 3.0, 3)
    assert moe_work.measure(call, seconds=0)[1] == 4


def test_backends(monkeypatch):
    resolve = moe_work.experts.resolve
    taken = {"auto": "kernel"}
    monkeypatch.setattr(moe_work.experts, "resolve", lambda name: taken.get(name) or resolve(name))
    assert moe_work.backends() == ["kernel", "loop"]
    taken["auto"] = "loop"
    assert moe_work.backends() == ["loop"]
    assert moe_work.backends("dense,loop") == ["dense", "loop"]
    with pytest.raises(ValueError, match="expert_backend is 'lop'.*nearest: loop"):
        moe_work.backends("lop")
