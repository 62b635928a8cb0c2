"""One set of experts for all layers, against a model whose layers have copies of it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import olmoe_jax
from olmoe_jax import accounting, checkpoints
from olmoe_jax import config as config_lib
from olmoe_jax.analysis import recording, trace
from olmoe_jax.model import transformer
from olmoe_jax.porting import configs
from tests import oracles
from tests.analysis import models
from tests.training import tiny

FP32 = 2e-5  # order of summation over layers
MODEL = config_lib.ModelConfig(
    vocab_size=models.VOCAB, max_length=models.LENGTH, num_layers=6, d_model=16, num_heads=2,
    num_kv_heads=2, d_ff=10, num_experts=7, num_experts_per_token=2, moe_every=2,
    num_shared_experts=1, share_experts_across_layers=True,
)  # fmt: skip
UNSHARED = dataclasses.replace(MODEL, share_experts_across_layers=False)
TOKENS = np.random.default_rng(0).integers(0, models.VOCAB, (3, models.LENGTH)).astype(np.int32)


@functools.cache
def _params():
    return oracles.random_params(transformer.Transformer(MODEL), TOKENS)


def _copied(params):
    """The parameters of UNSHARED: every MoE layer has the shared experts."""
    experts, layers = params["experts"], dict(params["layers"])
    stacked = {name: np.stack([w] * MODEL.num_moe_layers) for name, w in experts.items()}
    layers["block_1"] = layers["block_1"] | {"moe": layers["block_1"]["moe"] | stacked}
    return {n: x for n, x in params.items() if n != "experts"} | {"layers": layers}


@functools.partial(jax.jit, static_argnums=0)
def _value_and_gradient(config, params):
    def value(params):
        model = transformer.Transformer(config)
        out = model.apply({"params": params}, TOKENS, return_routing=True)
        return jnp.sum(jnp.sin(out.logits)), (out.logits, out.routing.expert_ids)

    (_, aux), gradient = jax.value_and_grad(value, has_aux=True)(params)
    return *aux, gradient


@pytest.mark.parametrize(
    "changes", [{}, {"remat": True}, {"expert_backend": "dense"}, {"router": "expert_choice"}]
)
def test_shared_experts_are_copies_whose_gradients_add_up(changes):
    config, unshared = (dataclasses.replace(c, **changes) for c in (MODEL, UNSHARED))
    logits, ids, gradient = _value_and_gradient(config, _params())
    want, want_ids, parts = _value_and_gradient(unshared, _copied(_params()))
    np.testing.assert_array_equal(ids, want_ids)
    assert ids.shape[0] == 3 and (ids[0] != ids[1]).any()  # the routers differ
    tiny.close(logits, want, FP32)
    moe = parts["layers"]["block_1"]["moe"]
    summed = {name: np.sum(moe[name], axis=0) for name in gradient["experts"]}
    jax.tree.map(functools.partial(tiny.close, tolerance=FP32), gradient["experts"], summed)
    mine = gradient["layers"]["block_1"]["moe"]
    assert set(mine) == {"router", "shared"}
    tiny.close(mine["router"], moe["router"], FP32)
    jax.tree.map(functools.partial(tiny.close, tolerance=FP32), mine["shared"], moe["shared"])


def test_the_experts_have_no_axis_of_layers_and_are_not_kept_for_each():
    shapes = jax.tree.map(jnp.shape, _params()["experts"])
    assert shapes == {"w_gate": (7, 16, 10), "w_up": (7, 16, 10), "w_down": (7, 10, 16)}
    assert _params()["layers"]["block_1"]["moe"]["router"].shape == (3, 16, 7)
    text = _value_and_gradient.lower(MODEL, _params()).as_text()
    assert "tensor<7x16x10xf32>" in text and "3x7x16x10x" not in text
    assert "3x7x16x10x" in _value_and_gradient.lower(UNSHARED, _copied(_params())).as_text()


def test_parameters_and_flops_by_hand():
    count = sum(x.size for x in jax.tree.leaves(_params()))
    params, unshared = accounting.num_params(MODEL), accounting.num_params(UNSHARED)
    assert params.total == count
    assert unshared.total - params.total == 2 * 7 * 3 * 16 * 10  # two of three sets
    assert params.active == unshared.active and params.router == unshared.router == 3 * 16 * 7
    length = models.LENGTH
    flops = [accounting.flops_per_token(c, length).training for c in (MODEL, UNSHARED)]
    assert flops[0] == flops[1]


def _run(**changes):
    return tiny.make_config(model={"share_experts_across_layers": True} | changes)


@pytest.mark.parametrize(
    ("mesh", "micro_batches"),
    [("one device", 4), ("expert 4 × data 2", 1), ("fsdp 2 × expert 2 × tensor 2", 1)],
)
def test_meshes_and_micro_batches_do_not_change_the_gradient(mesh, micro_batches):
    want, _ = tiny.gradient(_run())
    run = dataclasses.replace(
        _run(), training=dataclasses.replace(_run().training, micro_batches=micro_batches)
    )
    on_devices, _ = tiny.gradient_on_devices(run, mesh)
    w_gate = on_devices["experts"]["w_gate"]
    parts = {"one device": 1, "expert 4 × data 2": 4, "fsdp 2 × expert 2 × tensor 2": 8}[mesh]
    assert w_gate.addressable_shards[0].data.size == w_gate.size // parts
    jax.tree.map(tiny.close, jax.device_get(on_devices), want)


def test_a_step_updates_and_reports_them():
    state, (metrics,), _ = tiny.after_steps(_run(), "data 8", 1)
    old = tiny.random_params(_run().model)["experts"]["w_gate"]
    assert (np.asarray(state["params"]["experts"]["w_gate"]) != old).all()
    gradient, _ = tiny.gradient(_run())
    norm = np.sqrt(sum(np.square(x).sum() for x in jax.tree.leaves(gradient["experts"])))
    tiny.close(metrics["gradient_norms"]["experts"], norm)
    assert metrics["layer_gradient_norms"].shape == (2,)


def test_checkpoints_loading_and_recording(tmp_path):
    """Recorded layer by layer: the same choices as of the copies."""
    params = _params()
    found = {}
    for config, weights in ((MODEL, params), (UNSHARED, _copied(params))):
        name = str(config.share_experts_across_layers)
        data = config_lib.DataConfig(sequence_length=models.LENGTH)
        run = config_lib.Config(model=config, data=data)
        with checkpoints.Checkpoints(tmp_path / name, run) as saver:
            saver.save_params(0, jax.tree.map(jnp.asarray, weights))
        for streamed in (False, True):
            (recorded,) = recording.record(
                tmp_path / name, [models.text("a", 50)], accumulate=models.Blocks,
                streamed=streamed, announce=lambda line: None,
            )  # fmt: skip
            found[name, streamed] = trace.join(recorded.accumulated)
    model, loaded = olmoe_jax.load(tmp_path / "True", verify=True)
    assert model.config == MODEL
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    want = found["False", False]
    for key, block in found.items():
        np.testing.assert_array_equal(block.expert_ids, want.expert_ids, err_msg=str(key))
        np.testing.assert_allclose(block.losses, want.losses, rtol=1e-5)


def test_no_other_format_has_them_and_a_dense_model_neither():
    plain = dataclasses.replace(MODEL, moe_every=1, num_shared_experts=0)
    with pytest.raises(ValueError, match="here share_experts_across_layers=True, not False$"):
        configs.write(plain, dtype="float32")
    with pytest.raises(ValueError, match="here share_experts_across_layers=True"):
        configs.write_training(plain)
    with pytest.raises(ValueError, match="model.share_experts_across_layers is True: a dense"):
        config_lib.ModelConfig(num_experts=0, share_experts_across_layers=True)
