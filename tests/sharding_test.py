import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from olmoe_jax import config as config_lib
from olmoe_jax import sharding
from olmoe_jax.model import transformer
from olmoe_jax.training import optimizer

MODEL = config_lib.ModelConfig(
    vocab_size=62, max_length=7, num_layers=4, d_model=24, num_heads=2, num_kv_heads=2, d_ff=10,
    num_experts=12, num_experts_per_token=2,
)  # fmt: skip
KINDS = {
    "olmoe": {},
    "tied": {"tie_embeddings": True},
    "shared experts in every second layer": {"moe_every": 2, "num_shared_experts": 3},
    "experts shared across layers": {"share_experts_across_layers": True},
    "dense": {"num_experts": 0},
    "biases of loss-free balancing": {"router_bias": True},
    "norms of heads": {"qk_norm_per_head": True, "norm_position": "post"},
    "without norm scales": {"norm": "layernorm_nonparametric", "qk_norm": False},
}


def _shapes(**changes):
    model = transformer.Transformer(dataclasses.replace(MODEL, **changes))
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))[
        "params"
    ]


def _mesh(**sizes):
    return sharding.make_mesh(config_lib.MeshConfig(**({"data": 1} | sizes)))


def _by_path(tree):
    return {
        sharding.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_one_row_of_its_rank(kind):
    for path, leaf in _by_path(_shapes(**KINDS[kind])).items():
        axes = sharding.parameter_axes(path)
        assert len(leaf.shape) - len(axes) == path.startswith("layers/"), path


def test_every_row_of_the_table_is_used():
    paths = [path for kind in KINDS.values() for path in _by_path(_shapes(**kind))]
    stored = {path: sharding.parameter_axes(path) for path in paths}
    for pattern, axes in sharding.PARAMETER_AXES:
        matched = [p for p in stored if re.fullmatch(pattern.replace("*", ".*"), p)]
        assert matched and all(stored[p] == axes for p in matched), pattern


def test_the_layout_on_disk_has_the_same_rows():
    assert sharding.parameter_spec("layers/07/moe/w_gate", (12, 24, 10)) == PartitionSpec(
        "expert", "fsdp", "tensor"
    )


def test_an_unknown_parameter_is_an_error():
    for path in ("layers/block_0/moe/bias", "w_gate", "layers/block_0/attention/scale"):
        with pytest.raises(ValueError, match=f"parameter {path}: 0 rows"):
            sharding.parameter_axes(path)


def test_specs_split_what_the_table_says():
    placed = _by_path(sharding.parameter_shardings(_shapes(), _mesh(fsdp=2, expert=2, tensor=2)))
    specs = {path: tuple(s.spec) for path, s in placed.items()}
    assert specs["layers/block_0/moe/w_gate"] == (None, "expert", "fsdp", "tensor")
    assert specs["layers/block_0/moe/w_down"] == (None, "expert", "tensor", "fsdp")
    assert specs["layers/block_0/moe/router"] == (None, "fsdp", None)
    assert specs["layers/block_0/attention/output"] == (None, "tensor", "fsdp")
    assert specs["embedding"] == ("tensor", "fsdp")


@pytest.mark.parametrize(
    ("sizes", "changes", "message"),
    [
        (
            {"expert": 8},
            {},
            r"config\.mesh\.expert is 8: .*config\.model\.num_experts\) of .* which is 12",
        ),
        (
            {"fsdp": 8},
            {"d_model": 20},
            r"config\.mesh\.fsdp is 8: .*config\.model\.d_model\) of .* is 20",
        ),
        (
            {"tensor": 8},
            {"vocab_size": 64},
            r"config\.mesh\.tensor is 8: .*config\.model\.d_ff\) of .* is 10",
        ),
        (
            {"tensor": 2, "data": 4},
            {"vocab_size": 61},
            r"tensor is 2: .*config\.model\.vocab_multiple\) of .* is 61",
        ),
    ],
)
def test_a_mesh_that_does_not_divide_a_parameter_names_the_fields(sizes, changes, message):
    with pytest.raises(ValueError, match=message):
        sharding.parameter_shardings(_shapes(**changes), _mesh(**sizes))


@pytest.mark.parametrize(
    "changes", [{}, {"weight_decay": 0.0}, {"decay_norms": False, "decay_embeddings": False}]
)
def test_moments_follow_the_parameters(changes):
    params = _shapes(**KINDS["shared experts in every second layer"])
    made = optimizer.make_optimizer(config_lib.OptimizerConfig(**changes))
    state = {
        "params": params,
        "opt_state": jax.eval_shape(made.init, params),
        "step": jax.ShapeDtypeStruct((), jnp.int32),
        "rng": jax.ShapeDtypeStruct((2,), jnp.uint32),
    }
    placed = _by_path(sharding.state_shardings(state, _mesh(fsdp=2, expert=4)))
    shapes = _by_path(state)
    for name, parameter in _by_path(params).items():
        same = [p for p in placed if p.endswith("/" + name) and shapes[p].shape == parameter.shape]
        assert len(same) == 3, f"{name}: expected the parameter and two moments, found {same}"
        assert {placed[p].spec for p in same} == {sharding.parameter_spec(name, parameter.shape)}
    assert placed["step"].spec == placed["rng"].spec == PartitionSpec()


def test_a_mesh_has_the_sizes_asked_for_and_fills_in_the_rest():
    assert _mesh(data=-1, expert=4).shape == {"data": 2, "fsdp": 1, "expert": 4, "tensor": 1}
    assert sharding.batch_shards(_mesh(data=2, fsdp=2, tensor=2)) == 4
    one = sharding.make_mesh(config_lib.MeshConfig(), jax.devices()[:1])
    assert one.size == 1 and one.axis_names == sharding.MESH_AXES


@pytest.mark.parametrize("sizes", [{"data": 3}, {"data": -1, "fsdp": 3}, {"data": 4}, {"data": 16}])
def test_a_mesh_that_does_not_fit_the_devices_is_an_error(sizes):
    with pytest.raises(ValueError, match=r"config\.mesh is .*number of devices \(8\)"):
        _mesh(**sizes)


def test_constrain_does_nothing_without_a_mesh_and_splits_the_batch_with_one():
    x = jnp.arange(16.0).reshape(8, 2)
    assert sharding.constrain(x, "batch", None) is x
    with jax.set_mesh(_mesh(data=2, expert=4)):
        y = jax.jit(lambda x: sharding.constrain(x * 2, "batch", None))(x)
    assert {shard.data.shape for shard in y.addressable_shards} == {(1, 2)}
