"""One gradient, whatever the mesh, the micro-batches and remat; and what each device holds."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmoe_jax import sharding
from olmoe_jax.training import step as step_lib
from tests.training import tiny

# Parts into which each mesh splits an expert matrix.
SHARES = {
    "one device": 1,
    "data 8": 1,
    "fsdp 8": 8,
    "expert 4 × data 2": 4,
    "fsdp 2 × expert 2 × tensor 2": 8,
}


@functools.cache
def _reference(config):
    """(gradient, values) of a whole batch by plain autodiff of the formulas, on one device."""
    batch, model = tiny.random_batch(config), tiny.make_model(config)
    tokens, mask = batch["tokens"], batch["token_mask"]
    group = config.losses.load_balancing_group or len(tokens)
    k = config.model.num_experts_per_token

    def values(params):
        out = model.apply({"params": params}, tokens, token_mask=mask, return_routing=True)
        log_probs = jax.nn.log_softmax(out.logits)[:, :-1]
        nats = -jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)[..., 0]
        cross_entropy = jnp.sum(nats * batch["loss_mask"][:, 1:]) / batch["loss_mask"][:, 1:].sum()
        probs = jax.nn.softmax(out.routing.logits)
        chosen = jax.nn.one_hot(out.routing.expert_ids, config.model.num_experts).sum(-2)
        per_group = []
        for first in range(0, len(tokens), group):
            rows, count = slice(first, first + group), mask[first : first + group].sum()
            if count:
                real = mask[rows, :, None]
                f = jnp.sum(chosen[:, rows] * real, axis=(1, 2)) / count / k
                p = jnp.sum(probs[:, rows] * real, axis=(1, 2)) / count
                per_group.append(config.model.num_experts * jnp.mean(jnp.sum(f * p, axis=-1)))
        balance = sum(per_group) / len(per_group)
        z = jnp.square(jax.nn.logsumexp(out.routing.logits, axis=-1))
        z = jnp.sum(z * mask) / (config.model.num_moe_layers * mask.sum())
        return cross_entropy, balance, z, jnp.sum(chosen * mask[..., None], axis=(1, 2))

    def objective(params):
        cross_entropy, balance, z, load = values(params)
        weighted = config.losses.router_z_weight * z
        if config.model.router == "token_choice":
            weighted += config.losses.load_balancing_weight * balance
        return cross_entropy + weighted, (cross_entropy, balance, z, load)

    gradient, parts = jax.jit(jax.grad(objective, has_aux=True))(tiny.random_params(config.model))
    return jax.device_get(gradient), jax.device_get(parts)


def _check_against_reference(config, mesh):
    plain = tiny.make_config(losses={"load_balancing_group": config.losses.load_balancing_group})
    want, (cross_entropy, balance, z, load) = _reference(plain)
    assert (load.max(-1) > 2 * load.mean(-1)).all(), (
        "the routing is balanced: the test shows little"
    )
    gradient, parts = tiny.gradient_on_devices(config, mesh)
    w_gate = gradient["layers"]["block_0"]["moe"][
        "w_gate"
    ]  # the sum over micro-batches is split too
    assert w_gate.addressable_shards[0].data.size == w_gate.size // SHARES[mesh]
    jax.tree.map(tiny.close, gradient, want)
    for got, expected in ((parts.cross_entropy, cross_entropy), (parts.load_balancing, balance)):
        tiny.close(got, expected)
    tiny.close(parts.router_z, z)
    np.testing.assert_array_equal(parts.load, load)


# Every value of every factor, each pair of mesh and scope; the whole product is a slow test.
COVERING = [
    # micro-batches, remat, mesh, group (0: the whole batch), backend
    (1, False, "one device", 0, "auto"),
    (4, True, "one device", 2, "dense"),
    (4, False, "data 8", 0, "auto"),
    (4, True, "data 8", 2, "ragged"),
    (1, True, "fsdp 8", 0, "dense"),
    (4, False, "fsdp 8", 2, "loop"),
    (1, False, "expert 4 × data 2", 2, "dense"),
    (4, True, "expert 4 × data 2", 0, "loop"),
    (4, False, "fsdp 2 × expert 2 × tensor 2", 0, "loop"),
]
PRODUCT = list(
    itertools.product([1, 4], [False, True], tiny.MESHES, [0, 2], ["dense", "loop", "kernel"])
)


def _check_invariance(micro_batches, remat, mesh, group, backend):
    config = tiny.make_config(
        model={"remat": remat, "expert_backend": backend},
        losses={"load_balancing_group": group},
        training={"micro_batches": micro_batches},
    )
    _check_against_reference(config, mesh)


@pytest.mark.parametrize(("micro_batches", "remat", "mesh", "group", "backend"), COVERING)
def test_one_gradient_whatever_the_mesh_and_micro_batches(
    micro_batches, remat, mesh, group, backend
):
    _check_invariance(micro_batches, remat, mesh, group, backend)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("micro_batches", "remat", "mesh", "group", "backend"),
    [c for c in PRODUCT if c not in COVERING],
)
def test_one_gradient_in_all_combinations(micro_batches, remat, mesh, group, backend):
    _check_invariance(micro_batches, remat, mesh, group, backend)


@pytest.mark.parametrize(
    ("model", "micro_batches", "mesh"),
    [
        ({"router": "expert_choice"}, 4, "expert 4 × data 2"),
        ({"expert_backend": "capacity", "capacity_factor": 0.5}, 4, "data 8"),
        pytest.param(
            {"router": "expert_choice", "expert_backend": "loop"},
            4,
            "fsdp 8",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"expert_backend": "capacity", "capacity_factor": 0.5},
            1,
            "fsdp 8",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_groups_of_expert_choice_and_capacity_do_not_depend_on_the_mesh(model, micro_batches, mesh):
    config = tiny.make_config(
        model=model | {"remat": True},
        losses={"load_balancing_group": 2},
        training={"micro_batches": micro_batches},
    )
    plain = tiny.make_config(model=model, losses={"load_balancing_group": 2})
    want, (cross_entropy, _, _, load) = _reference(plain)
    gradient, parts = tiny.gradient(config, mesh)
    jax.tree.map(tiny.close, gradient, want)
    tiny.close(parts.cross_entropy, cross_entropy)
    np.testing.assert_array_equal(parts.load, load)


@pytest.mark.parametrize("mesh", ["fsdp 8", "expert 4 × data 2"])
def test_each_device_holds_only_its_share(mesh):
    """Of parameters and both moments, after a step."""
    state, _, _ = tiny.after_steps(tiny.CONFIG, mesh, 1)
    shapes = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = sharding.path_name(path)
        if "/moe/w_" in name:
            sizes = {shard.data.size for shard in leaf.addressable_shards}
            assert len(leaf.addressable_shards) == 8
            assert sizes == {leaf.size // SHARES[mesh]}, name
            shapes[name] = leaf.addressable_shards[0].data.shape
    assert len(shapes) == 9  # three matrices and the two moments of each
    names = [name for name in shapes if name.endswith("w_gate")]
    want = (2, 8, 2, 6) if mesh == "fsdp 8" else (2, 2, 16, 6)
    assert {shapes[name] for name in names} == {want}


@pytest.mark.slow
def test_a_fresh_state_is_the_same_on_every_mesh():
    states = []
    for name in ("one device", "fsdp 8", "expert 4 × data 2"):
        mesh = tiny.make_mesh(name)
        init = functools.partial(step_lib.init_state, config=tiny.CONFIG)
        placed = sharding.state_shardings(jax.eval_shape(init, jax.random.key(7)), mesh)
        with jax.set_mesh(mesh):
            states.append(jax.device_get(jax.jit(init, out_shardings=placed)(jax.random.key(7))))
    for other in states[1:]:
        jax.tree.map(np.testing.assert_array_equal, states[0], other)
