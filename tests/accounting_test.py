import dataclasses
import functools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest

from olmoe_jax import accounting, presets
from olmoe_jax import config as config_lib
from olmoe_jax.benchmarking import work
from olmoe_jax.model import moe, transformer
from olmoe_jax.training import step

TINY = config_lib.ModelConfig(
    vocab_size=97, max_length=89, num_layers=6, d_model=10, num_heads=5, num_kv_heads=5, d_ff=7,
    num_experts=11, num_experts_per_token=3,
)  # fmt: skip
OLMOE = presets.get("olmoe-1b-7b")


def _shapes(config):
    model = transformer.Transformer(config)
    tokens = jnp.zeros((1, 2), jnp.int32)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), tokens)["params"])


def _size(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", presets.NAMES)
def test_total_is_the_models_own_size(name):
    config = presets.get(name)
    assert accounting.num_params(config).total == _size(_shapes(config))


@hypothesis.settings(derandomize=True, deadline=None, max_examples=20)
@hypothesis.given(st.data())
def test_counts_are_the_models_own_for_altered_shapes(data):
    pick = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    experts, heads = pick(0, 1, 3, 7), pick(1, 2, 6)
    config = config_lib.ModelConfig(
        vocab_size=pick(1, 11, 32), vocab_multiple=pick(1, 8), num_layers=6,
        moe_every=pick(1, 2, 3), d_model=12, num_heads=heads,
        num_kv_heads=pick(*(g for g in (1, 2, 3) if heads % g == 0)),
        head_dim=pick(None, 2, 4) if heads < 6 else 4, d_ff=pick(5, 13), num_experts=experts,
        num_experts_per_token=pick(*range(1, experts + 1)) if experts else 0,
        num_shared_experts=pick(0, 1, 2) if experts else 0, qk_norm=pick(True, False),
        norm=pick(*config_lib.NORM_NAMES), tie_embeddings=pick(True, False),
        norm_position=pick(*config_lib.NORM_POSITIONS),
    )  # fmt: skip
    config = dataclasses.replace(config, qk_norm_per_head=config.qk_norm and pick(True, False))
    shapes, counted = _shapes(config), accounting.num_params(config)
    assert counted.total == _size(shapes)
    idle = 0  # parameters of the experts that a token does not choose
    for block in shapes["layers"].values():
        for name in ("w_gate", "w_up", "w_down"):
            if "moe" in block:
                one_expert = _size(block["moe"][name]) // experts
                idle += one_expert * (experts - config.num_experts_per_token)
    assert counted.active == counted.total - idle
    matrices = {name: _size(shapes.get(name, {})) for name in ("embedding", "lm_head")}
    assert counted.embedding == matrices["embedding"]
    assert counted.head == matrices["lm_head"]
    assert counted.non_embedding == counted.total - sum(matrices.values())
    scales = [
        x for path, x in jax.tree.leaves_with_path(shapes) if "scale" in jax.tree_util.keystr(path)
    ]
    assert counted.norms == _size(scales)


def test_olmoe_without_embedding_and_head():
    counted = accounting.num_params(OLMOE)
    assert counted.total - counted.embedding == 6_816_139_264
    assert counted.active - counted.embedding == 1_178_994_688
    assert counted.non_embedding == 6_713_116_672
    assert counted.active_non_embedding == 1_075_972_096


def test_olmoe_flops_per_token():
    flops = accounting.flops_per_token(OLMOE, 4096)
    assert round(flops.forward / 1e9, 3) == 2.626
    assert round(flops.training / 1e9, 2) == 7.88
    assert flops.executed == flops.training
    recomputed = accounting.flops_per_token(dataclasses.replace(OLMOE, remat=True), 4096)
    assert recomputed.training == flops.training
    head = 2 * 50_304 * 2048  # the chunked loss recomputes nothing
    assert recomputed.executed == flops.training + flops.forward - head


def test_flops_equal_xlas_count_of_the_same_products():
    # One dense layer, as XLA counts the body of a scan once.
    length, batch = 31, 2
    config = dataclasses.replace(
        TINY, num_layers=1, num_experts=0, d_model=64, num_heads=4, num_kv_heads=2, d_ff=128
    )
    model = transformer.Transformer(config)
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    lowered = jax.jit(lambda p, t: model.apply({"params": p}, t).logits).lower(
        _shapes(config), tokens
    )
    counted = lowered.compile().cost_analysis()["flops"] / (batch * length)
    flops = accounting.flops_per_token(config, length).forward
    unmasked = flops + 2 * 64 * length  # XLA computes the masked half of the scores too
    assert unmasked < counted < 1.15 * unmasked  # norms, softmax and activations come on top


def test_flops_of_one_moe_layer():
    config = dataclasses.replace(TINY, num_layers=1, num_shared_experts=2)
    layer = accounting.moe_flops_per_token(config)
    assert layer.forward == 2 * 10 * 11 + (3 + 2) * 3 * 2 * 10 * 7
    assert layer.training == layer.executed == 3 * layer.forward
    # What is left of the whole model's when the layer has no FFN: head, projections, scores.
    rest = 2 * 97 * 10 + 2 * 4 * 10 * 10 + 2 * 10 * 13
    assert accounting.flops_per_token(config, 13).forward == layer.forward + rest


def test_flops_of_a_moe_layer_equal_xlas_count():
    # All experts chosen: then the dense backend does exactly the layer's work.
    d, f, e, tokens = 64, 128, 7, 31
    layer = moe.MoE(
        num_experts=e, num_experts_per_token=e, num_shared_experts=0, d_ff=f,
        router="token_choice", normalize_expert_weights=False, router_dtype=jnp.float32,
        expert_backend="dense", capacity_factor=1.0, group=0,
        kernel_init=jax.nn.initializers.zeros,
    )  # fmt: skip
    x, mask = jnp.zeros((1, tokens, d)), jnp.ones((1, tokens), bool)
    params = jax.eval_shape(lambda: layer.init(jax.random.key(0), x, mask))
    lowered = jax.jit(lambda p: layer.apply(p, x, mask)[0]).lower(params)
    counted = lowered.compile().cost_analysis()["flops"] / tokens
    config = config_lib.ModelConfig(
        num_layers=1, d_model=d, num_heads=1, num_kv_heads=1, d_ff=f, num_experts=e,
        num_experts_per_token=e,
    )  # fmt: skip
    assert 1 < counted / accounting.moe_flops_per_token(config).forward < 1.15  # SiLU, softmax


def test_causal_attention_and_group_size_in_flops():
    base, longer = (accounting.flops_per_token(TINY, length).forward for length in (13, 26))
    assert longer - base == 6 * 2 * 10 * 13
    # Keys and values shared by all heads: two matrices shrink by 4/5 in each of the 6 layers.
    grouped = dataclasses.replace(TINY, num_kv_heads=1)
    assert base - accounting.flops_per_token(grouped, 13).forward == 6 * 2 * 2 * 10 * 8


@pytest.mark.parametrize("window", [1, 5, 13, 20])
def test_sliding_window_in_flops(window):
    length = 13
    model = dataclasses.replace(TINY, sliding_window=window)
    saved = accounting.flops_per_token(TINY, length).forward
    saved -= accounting.flops_per_token(model, length).forward
    # The corner of the triangle of scores that the window cuts off, over all tokens of the window.
    corner = max(0, length - window) ** 2 / 2
    assert saved == pytest.approx(6 * 4 * 10 * corner / length, abs=6)


def _run(model, **training):
    return config_lib.Config(
        model=model,
        data=config_lib.DataConfig(sequence_length=64),
        training=config_lib.TrainingConfig(**{"batch_size": 8, "num_steps": 25} | training),
        checkpoint=config_lib.CheckpointConfig(
            interval=10, full_state_at=(10, 30), dtype="bfloat16"
        ),
    )


def test_disk_of_a_run():
    disk, params = accounting.disk(_run(TINY)), accounting.num_params(TINY).total
    assert disk.num_checkpoints == 4  # steps 0, 10, 20 and the last, 25
    assert disk.checkpoints == 4 * 2 * params
    assert disk.states == (2 + 1 + 1) * 12 * params  # newest two, one being written, step 10
    assert disk.total == disk.checkpoints + disk.states
    assert accounting.disk(_run(TINY, num_steps=20)).num_checkpoints == 3


def test_disk_of_the_public_checkpoints():
    config = _run(OLMOE, num_steps=1_220_000)
    config = dataclasses.replace(config, checkpoint=config_lib.CheckpointConfig(interval=5000))
    assert accounting.disk(config).num_checkpoints == 244 + 1  # and step 0


def test_step_memory_follows_what_it_depends_on():
    base = accounting.step_memory(_run(TINY))
    params = accounting.num_params(TINY).total
    assert (base.state, base.gradients, base.weights) == (12 * params, 4 * params, 0)
    assert base.total == base.state + base.gradients + base.activations + base.logits
    halved = accounting.step_memory(_run(TINY, micro_batches=2))
    assert halved.activations == pytest.approx(base.activations / 2, abs=1)
    assert halved.gradients == 2 * base.gradients
    sharded = accounting.step_memory(_run(TINY), param_shards=4, batch_shards=2)
    assert sharded.state == base.state / 4
    assert sharded.activations == pytest.approx(base.activations / 2, abs=1)
    remat = accounting.step_memory(_run(dataclasses.replace(TINY, remat=True)))
    assert remat.activations < base.activations / 2
    reference = accounting.step_memory(_run(dataclasses.replace(TINY, expert_backend="dense")))
    eight_more_slots = 6 * (11 - 3) * 2 * 7 * 4  # bytes per token
    assert reference.activations == base.activations + 8 * 64 * eight_more_slots
    half = accounting.step_memory(_run(dataclasses.replace(TINY, dtype="bfloat16")))
    assert half.weights == 2 * params
    assert half.activations < base.activations


def test_activations_that_a_layer_keeps():
    residual, heads, experts, routing = 2 * 10, 4 * 10, 2 * 3 * 7, 11 + 3 + 3
    by_hand = 4 * (residual + heads + experts + routing) + 4 * 5
    assert accounting.activation_bytes(TINY) == by_hand
    half = dataclasses.replace(TINY, dtype="bfloat16")
    assert accounting.activation_bytes(half) == by_hand - 2 * (residual + heads + experts)
    post = dataclasses.replace(TINY, norm_position="post")
    assert accounting.activation_bytes(post) == by_hand + 4 * 10
    grouped = dataclasses.replace(TINY, num_kv_heads=1)
    assert accounting.activation_bytes(grouped) == by_hand - 4 * 2 * 8
    shared = dataclasses.replace(TINY, num_shared_experts=1)
    assert accounting.activation_bytes(shared) == by_hand + 4 * 2 * 7
    dense = 4 * (residual + heads + 2 * 7) + 4 * 5
    assert accounting.activation_bytes(dataclasses.replace(TINY, num_experts=0)) == dense
    mixed = dataclasses.replace(TINY, moe_every=3)
    assert accounting.activation_bytes(mixed) == pytest.approx((by_hand + 2 * dense) / 3)
    reference = dataclasses.replace(TINY, expert_backend="dense")
    assert accounting.activation_bytes(reference) == by_hand + 4 * 2 * (11 - 3) * 7


def test_tensors_that_a_step_cannot_do_without():
    needed, params = accounting.step_bytes(_run(TINY)), accounting.num_params(TINY).total
    assert (needed.parameters, needed.gradients, needed.moments) == (
        4 * params, 4 * params, 8 * params
    )  # fmt: skip
    tokens, layer = 8 * 64, accounting.activation_bytes(TINY)
    assert needed.activations == tokens * (6 * layer + 2 * 4 * 10)
    assert needed.total == 16 * params + needed.activations
    half = accounting.step_bytes(_run(TINY), state_dtype="bfloat16")
    assert half.total - half.activations == 8 * params
    assert half.activations == needed.activations  # the compute dtype's
    parts = accounting.step_bytes(_run(TINY, micro_batches=4))
    assert parts.activations == needed.activations / 4
    assert parts.gradients == 2 * needed.gradients
    remat = accounting.step_bytes(_run(dataclasses.replace(TINY, remat=True)))
    inputs_and_routing = 6 * 4 * (10 + 11 + 3 + 3)
    assert remat.activations == tokens * (inputs_and_routing + layer + 2 * 4 * 10)


def _temporaries(num_layers, dtype):
    """Bytes of XLA's temporaries of a train step without what does not grow with the layers, and
    the config."""
    config = work.config(
        num_layers=num_layers, dtype=dtype, vocab_size=499, max_length=128, d_model=64,
        num_heads=4, num_kv_heads=4, d_ff=32, num_experts=8, num_experts_per_token=2,
        expert_backend="loop",
    )  # fmt: skip
    return work.lower(config).compile().memory_analysis().temp_size_in_bytes, config


@pytest.mark.slow  # compiles two train steps
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_keeps_what_the_accounting_says(dtype):
    few, _ = _temporaries(3, dtype)
    many, config = _temporaries(7, dtype)
    model, tokens = config.model, config.tokens_per_step
    one = dataclasses.replace(model, num_layers=1)
    fixed = accounting.num_params(one).embedding + accounting.num_params(one).head + one.d_model
    gradients = (accounting.num_params(one).total - fixed) * accounting.BYTES[dtype]
    kept = (many - few) / 4 - gradients
    # Before 0.12 XLA's CPU has no bfloat16: a scan stacks such arrays and float32 copies of them.
    old = dtype == "bfloat16" and jax.__version_info__ < (0, 12)
    assert 0.9 < kept / (tokens * accounting.activation_bytes(model)) < (3 if old else 1.3)


@pytest.mark.slow  # compiles a train step
@pytest.mark.parametrize("remat", [False, True])
def test_step_memory_is_near_what_xla_needs(remat):
    model = config_lib.ModelConfig(
        vocab_size=499, max_length=128, num_layers=3, d_model=64, num_heads=4, num_kv_heads=4,
        d_ff=32, num_experts=8, num_experts_per_token=2, remat=remat,
    )  # fmt: skip
    config = config_lib.Config(
        model=model,
        data=config_lib.DataConfig(sequence_length=128),
        training=config_lib.TrainingConfig(batch_size=16),
    )
    network = transformer.Transformer(model)
    init = functools.partial(step.init_state, config=config)
    state = jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)))
    fields = {"tokens": jnp.int32, "token_mask": bool, "loss_mask": bool}
    batch = {name: jax.ShapeDtypeStruct((16, 128), dtype) for name, dtype in fields.items()}
    train = jax.jit(functools.partial(step.train_step, model=network, config=config))
    needed = train.lower(state, batch).compile().memory_analysis().temp_size_in_bytes
    estimated = accounting.step_memory(config)
    assert 0.6 < (estimated.total - estimated.state) / needed < 1.6


@pytest.mark.parametrize(
    ("kind", "dtype", "teraflops"),
    [
        ("TPU v5p", "bfloat16", 459), ("TPU v5", "bfloat16", 459), ("TPU v5 lite", "float32", 197),
        ("TPU v6 lite", "bfloat16", 918), ("TPU v4", "bfloat16", 275),
        ("TPU7x", "bfloat16", 1153.5),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989), ("NVIDIA H100 80GB HBM3", "float32", 494.5),
        ("NVIDIA H100 PCIe", "bfloat16", 756), ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
        ("NVIDIA H200", "bfloat16", 989), ("NVIDIA B200", "bfloat16", 2250),
    ],
)  # fmt: skip
def test_peak_by_device_kind(kind, dtype, teraflops):
    peak = accounting.peak(kind, dtype)
    assert peak.flops_per_second == pytest.approx(teraflops * 1e12)
    assert peak.source


def test_a_cpu_has_no_tabulated_peak():
    assert accounting.peak("cpu") is None


def test_reference_mfu():
    # 23,600 tokens/s on each of 128 H100.
    training = accounting.flops_per_token(OLMOE, 4096).training
    mfu = 23_600 * training / accounting.peak("NVIDIA H100 80GB HBM3").flops_per_second
    assert round(mfu, 3) == 0.188
