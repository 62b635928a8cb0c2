"""Tests of the optimizer: torch is the oracle where it is installed, a NumPy loop everywhere."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmoe_jax.config import OptimizerConfig
from olmoe_jax.training import optimizer

FP32 = 2e-6  # a few float32 roundings per step, relative to values of order one
RATE = 1e-6  # the step ratio and one cosine in float32

REFERENCE = OptimizerConfig(
    learning_rate=4e-4,
    warmup_tokens=10_485_760_000,
    decay_tokens=5_000_000_000_000,
    final_fraction=0.1,
)
REFERENCE_BATCH = 1024 * 4096

n, d, e, f, h, v = 2, 5, 7, 3, 11, 13


def random_tree(seed, scale=1.0):
    """A parameter tree of four layers: dense ones in block 0, MoE ones in block 1."""
    rng = np.random.default_rng(seed)

    def leaf(*shape):
        return (scale * rng.normal(size=shape)).astype(np.float32)

    def block(ffn):
        return {
            "attention_norm": {"scale": leaf(n, d)},
            "attention": {
                "query": leaf(n, d, h), "key": leaf(n, d, h), "value": leaf(n, d, h),
                "output": leaf(n, h, d),
                "query_norm": {"scale": leaf(n, h)}, "key_norm": {"scale": leaf(n, h)},
            },
            "ffn_norm": {"scale": leaf(n, d)},
            **ffn,
        }  # fmt: skip

    def swiglu(*lead):
        return {"w_gate": leaf(*lead, d, f), "w_up": leaf(*lead, d, f), "w_down": leaf(*lead, f, d)}

    moe = {"router": leaf(n, d, e), **swiglu(n, e), "shared": swiglu(n)}
    return {
        "embedding": leaf(v, d),
        "lm_head": leaf(v, d),
        "final_norm": {"scale": leaf(d)},
        "layers": {"block_0": block({"ffn": swiglu(n)}), "block_1": block({"moe": moe})},
    }


def names(tree):
    return {
        optimizer.sharding.path_name(p): leaf
        for p, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (4_194_304, 4.0144e-5),
        (5_242_880_000, 2.2e-4),
        (10_485_760_000, 4e-4),
        (1e12, 3.66180e-4),
        (2.5e12, 2.20594e-4),
        (4e12, 7.45168e-5),
        (5e12, 4e-5),
        (5.133e12, 4e-5),
    ],
)
def test_reference_learning_rates(tokens, expected):
    rate = jax.jit(
        lambda step: optimizer.learning_rate(REFERENCE, step, REFERENCE_BATCH, 1_220_000)
    )
    step = round(tokens / REFERENCE_BATCH) - 1
    got = rate(jnp.int32(step))
    assert got.dtype == jnp.float32
    # one step, by which round() may miss the token count, changes the rate by 1e-6 of itself
    assert float(got) == pytest.approx(expected, rel=5e-6)


def exact_rate(config, seen, num_steps, tokens_per_step):
    """The schedule in Python integers and doubles, by token count."""
    tokens = seen * tokens_per_step
    end = config.decay_tokens or num_steps * tokens_per_step
    peak, final = config.learning_rate, config.learning_rate * config.final_fraction
    if tokens < config.warmup_tokens:
        low = peak * config.warmup_start_fraction
        return low + (peak - low) * tokens / config.warmup_tokens
    if config.schedule == "constant":
        return peak
    x = min(1.0, (tokens - config.warmup_tokens) / (end - config.warmup_tokens))
    if config.schedule == "cosine":
        return final + (peak - final) * (1 + math.cos(math.pi * x)) / 2
    return peak + (final - peak) * x


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rate_is_exact_in_float32_over_5e12_tokens(schedule):
    config = dataclasses.replace(REFERENCE, schedule=schedule)
    steps = np.unique(np.geomspace(1, 1_300_000, 997).astype(int)) - 1
    got = jax.vmap(lambda s: optimizer.learning_rate(config, s, REFERENCE_BATCH, 1_220_000))(
        jnp.asarray(steps)
    )
    exact = [exact_rate(config, int(s) + 1, 1_220_000, REFERENCE_BATCH) for s in steps]
    np.testing.assert_allclose(
        np.asarray(got, np.float64), exact, rtol=RATE, atol=RATE * config.learning_rate
    )


def test_anneal_falls_linearly_to_zero_at_the_last_step():
    config = OptimizerConfig(
        learning_rate=4e-5, schedule="linear", final_fraction=0.0, warmup_tokens=0
    )
    rate = lambda step: float(optimizer.learning_rate(config, step, 4_194_304, 23_842))  # noqa: E731
    assert rate(0) == pytest.approx(4e-5 * (1 - 1 / 23_842), rel=RATE)
    assert rate(11_920) == pytest.approx(2e-5, rel=1e-4)
    assert rate(23_841) == 0.0


def test_warmup_longer_than_the_run_only_rises():
    config = OptimizerConfig(learning_rate=1.0, warmup_tokens=1000, warmup_start_fraction=0.2)
    rates = [float(optimizer.learning_rate(config, step, 10, 7)) for step in range(7)]
    np.testing.assert_allclose(
        rates, [0.2 + 0.8 * (step + 1) / 100 for step in range(7)], rtol=RATE
    )


def decayed_names(config):
    mask = names(optimizer.decay_mask(random_tree(0), config))
    return {name for name, decays in mask.items() if decays}


def test_everything_decays_by_default():
    assert decayed_names(OptimizerConfig()) == set(names(random_tree(0)))


def test_norms_can_be_left_out_of_weight_decay():
    left_out = set(names(random_tree(0))) - decayed_names(OptimizerConfig(decay_norms=False))
    per_block = ("attention_norm", "attention/query_norm", "attention/key_norm", "ffn_norm")
    expected = {f"layers/block_{p}/{norm}/scale" for p in (0, 1) for norm in per_block}
    assert left_out == expected | {"final_norm/scale"}


def test_embedding_and_head_can_be_left_out_of_weight_decay():
    left_out = set(names(random_tree(0))) - decayed_names(OptimizerConfig(decay_embeddings=False))
    assert left_out == {"embedding", "lm_head"}


CONFIGS = [
    OptimizerConfig(learning_rate=3e-3, weight_decay=0.1),
    OptimizerConfig(
        learning_rate=3e-3, weight_decay=0.3, decay_norms=False, decay_embeddings=False
    ),
    OptimizerConfig(
        learning_rate=3e-3, weight_decay=0.0, beta1=0.8, beta2=0.99, eps=1e-3, clip_norm=1e4
    ),
]
STEPS = 5


def ours(config, params, gradients):
    """Parameters and clip norms after updates with the given gradients, rate · (step + 1) / 5."""
    transformation = optimizer.make_optimizer(config)
    state, norms = transformation.init(params), []

    @jax.jit
    def update(params, state, grads, step):
        norm = optimizer.global_norms(grads).total
        grads = optimizer.clip(grads, norm, config.clip_norm)
        updates, state = transformation.update(grads, state, params)
        return (
            optimizer.apply(params, updates, config.learning_rate * (step + 1) / STEPS),
            state,
            norm,
        )

    for step, grads in enumerate(gradients):
        params, state, norm = update(params, state, grads, jnp.float32(step))
        norms.append(float(norm))
    return names(params), norms


def numpy_reference(config, params, gradients):
    """The same with NumPy loops in float64, from the formulas of the AdamW paper."""
    params = {k: x.astype(np.float64) for k, x in names(params).items()}
    m = {k: np.zeros_like(x) for k, x in params.items()}
    s = {k: np.zeros_like(x) for k, x in params.items()}
    norms = []
    for step, grads in enumerate(gradients):
        grads = {k: x.astype(np.float64) for k, x in names(grads).items()}
        norms.append(math.sqrt(sum(float(np.sum(g * g)) for g in grads.values())))
        clip = min(1.0, config.clip_norm / (norms[-1] + 1e-6))
        rate = config.learning_rate * (step + 1) / STEPS
        for k, p in params.items():
            g = grads[k] * clip
            m[k] = config.beta1 * m[k] + (1 - config.beta1) * g
            s[k] = config.beta2 * s[k] + (1 - config.beta2) * g * g
            m_hat, s_hat = (
                m[k] / (1 - config.beta1 ** (step + 1)),
                s[k] / (1 - config.beta2 ** (step + 1)),
            )
            excluded = (k.endswith("scale") and not config.decay_norms) or (
                k in ("embedding", "lm_head") and not config.decay_embeddings
            )
            decay = 0.0 if excluded else config.weight_decay
            params[k] = p - rate * (m_hat / (np.sqrt(s_hat) + config.eps) + decay * p)
    return params, norms


def torch_reference(torch, config, params, gradients):
    """The same with torch.optim.AdamW and torch.nn.utils.clip_grad_norm_."""
    tensors = {k: torch.nn.Parameter(torch.from_numpy(x.copy())) for k, x in names(params).items()}
    decayed = {k for k, decays in names(optimizer.decay_mask(params, config)).items() if decays}
    groups = [
        {
            "params": [t for k, t in tensors.items() if k in decayed],
            "weight_decay": config.weight_decay,
        },
        {"params": [t for k, t in tensors.items() if k not in decayed], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=1.0, betas=(config.beta1, config.beta2), eps=config.eps,
    )  # fmt: skip
    norms = []
    for step, grads in enumerate(gradients):
        for k, g in names(grads).items():
            tensors[k].grad = torch.from_numpy(g.copy())
        norms.append(float(torch.nn.utils.clip_grad_norm_(tensors.values(), config.clip_norm)))
        for group in adamw.param_groups:
            group["lr"] = config.learning_rate * (step + 1) / STEPS
        adamw.step()
    return {k: t.detach().numpy() for k, t in tensors.items()}, norms


@pytest.mark.parametrize("config", CONFIGS, ids=["reference", "exclusions", "no decay, no clip"])
@pytest.mark.parametrize("oracle", ["numpy", "torch"])
def test_updates_equal_the_oracle(config, oracle):
    # the first gradient is small enough not to be clipped at norm 1
    gradients = [random_tree(10 + i, scale=0.005 if i == 0 else 0.3) for i in range(STEPS)]
    params = random_tree(1)
    if oracle == "torch":
        torch = pytest.importorskip("torch", reason="torch, the oracle of AdamW, is not installed")
        expected, expected_norms = torch_reference(torch, config, params, gradients)
    else:
        expected, expected_norms = numpy_reference(config, params, gradients)
    assert expected_norms[0] < 1 < expected_norms[1]
    got, norms = ours(config, params, gradients)
    np.testing.assert_allclose(norms, expected_norms, rtol=FP32)
    assert set(got) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=FP32, atol=FP32, err_msg=name)


def test_clipping_leaves_small_gradients_untouched_and_keeps_the_direction():
    grads = random_tree(3, scale=1e-3)

    @jax.jit
    def clip(grads, limit):
        norm = optimizer.global_norms(grads).total
        return optimizer.clip(grads, norm, limit), norm

    clipped, norm = clip(grads, 1.0)
    assert float(norm) < 1
    for name, value in names(clipped).items():
        np.testing.assert_array_equal(value, names(grads)[name])
    clipped, norm = clip(grads, 0.01)
    _, after = clip(clipped, 1.0)
    assert float(after) == pytest.approx(0.01 * float(norm) / (float(norm) + 1e-6), rel=1e-5)


def test_moments_are_float32_and_params_keep_their_dtype():
    tree = random_tree(1)
    params = {"embedding": jnp.asarray(tree["embedding"], jnp.bfloat16), "lm_head": tree["lm_head"]}
    transformation = optimizer.make_optimizer(OptimizerConfig())
    state = transformation.init(params)
    updates, new_state = transformation.update(params, state, params)
    for tree in (state, new_state):
        assert {str(x.dtype) for x in jax.tree.leaves(tree)} == {"float32", "int32"}
    assert jax.tree.structure(state) == jax.tree.structure(new_state)
    new = optimizer.apply(params, updates, 0.1)
    assert jax.tree.map(lambda x: x.dtype, new) == jax.tree.map(lambda x: x.dtype, params)


def test_norms_by_group_and_layer():
    grads = random_tree(7)
    total, groups, layers = jax.jit(optimizer.global_norms)(grads)
    expected = {}
    for name, value in names(grads).items():
        last = name.split("/")[-1]
        if last == "scale":
            group = "norms"
        elif "shared" in name:
            group = "shared_experts"
        elif last == "router":
            group = "router"
        elif "/moe/" in name:
            group = "experts"
        else:
            group = next(g for g in ("embedding", "lm_head", "attention", "ffn") if g in name)
        expected.setdefault(group, []).append(value.ravel())
    assert set(groups) == set(expected)
    for group, values in expected.items():
        assert float(groups[group]) == pytest.approx(
            np.linalg.norm(np.concatenate(values)), rel=FP32
        )

    by_layer = np.zeros(2 * n)
    for layer in range(2 * n):
        block = grads["layers"][f"block_{layer % 2}"]
        by_layer[layer] = math.sqrt(
            sum(float(np.sum(x[layer // 2] ** 2)) for x in jax.tree.leaves(block))
        )
    np.testing.assert_allclose(layers, by_layer, rtol=FP32)

    assert math.sqrt(sum(float(x) ** 2 for x in groups.values())) == pytest.approx(
        float(total), rel=FP32
    )


def test_layers_of_many_blocks_keep_their_order():
    """Ten blocks and more: block_10 comes after block_9, not after block_1."""
    grads = {
        "layers": {
            f"block_{p}": {"ffn_norm": {"scale": jnp.array([[p + 0.0], [p + 11.0]])}}
            for p in range(11)
        }
    }
    layers = optimizer.global_norms(grads).layers
    np.testing.assert_allclose(layers, np.arange(22.0))


def test_an_unknown_parameter_has_no_gradient_group():
    with pytest.raises(ValueError, match="layers/block_0/novel"):
        optimizer.gradient_group("layers/block_0/novel")
