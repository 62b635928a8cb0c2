import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from olmoe_jax import checkpoints, config
from olmoe_jax.checkpoints import layout

SHAPES = {
    "every layer MoE": {},
    "every second layer MoE": {"moe_every": 2},
    "tied": {"tie_embeddings": True},
    "dense": {"num_experts": 0, "num_experts_per_token": 1},
    "shared expert, no q/k norms": {"num_shared_experts": 3, "qk_norm": False},
    "norms without parameters": {"norm": "layernorm_nonparametric", "qk_norm": False},
}


@pytest.mark.parametrize("name", SHAPES)
def test_from_stored_undoes_to_stored(name, make_config, random_params, same_bits):
    model = make_config(num_layers=4, **SHAPES[name]).model
    params = random_params(model)
    stored = layout.to_stored(params, model)
    assert sorted(stored["layers"]) == ["00", "01", "02", "03"]
    assert same_bits(layout.from_stored(stored, model), params)


def test_layers_keep_their_numbers_beyond_ten():
    model = config.ModelConfig(num_layers=24, moe_every=2, num_experts=4, num_experts_per_token=2)
    params = {
        "embedding": np.zeros((3, 2)),
        "layers": {
            "block_0": {"ffn": {"w_up": np.arange(0, 24, 2)}},
            "block_1": {"moe": {"router": np.arange(1, 24, 2)}},
        },
    }
    stored = layout.to_stored(params, model)
    assert list(stored["layers"]) == [f"{i:02d}" for i in range(24)]
    for i in range(24):
        (part,) = stored["layers"][f"{i:02d}"].values()
        (value,) = part.values()
        assert value == i
    shuffled = {
        **stored,
        "layers": dict(sorted(stored["layers"].items(), key=lambda x: x[0][::-1])),
    }
    back = layout.from_stored(shuffled, model)
    np.testing.assert_array_equal(back["layers"]["block_0"]["ffn"]["w_up"], np.arange(0, 24, 2))
    np.testing.assert_array_equal(back["layers"]["block_1"]["moe"]["router"], np.arange(1, 24, 2))


def test_more_than_a_hundred_layers_have_three_digits():
    model = config.ModelConfig(num_layers=101)
    names = layout.stored_names("layers/block_0/moe/router", model)
    assert (names[0], names[-1]) == ("layers/000/moe/router", "layers/100/moe/router")
    assert layout.training_name(names[-1], model) == "layers/block_0/moe/router"


def test_layout_works_on_abstract_trees_and_under_jit(make_config, random_params, same_bits):
    model = make_config(num_layers=6, moe_every=2).model
    params = random_params(model)
    abstract = layout.to_stored(checkpoints.abstract_params(model), model)
    stored = jax.jit(lambda p: layout.to_stored(p, model))(params)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), abstract)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), stored)
    assert same_bits(jax.jit(lambda s: layout.from_stored(s, model))(stored), params)
    back = layout.from_stored(abstract, model)
    assert jax.tree.map(lambda x: x.shape, back) == jax.tree.map(lambda x: x.shape, params)


def test_a_slice_is_laid_out_as_its_stack():
    model = config.ModelConfig(num_layers=3)
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("fsdp", "expert"))
    leaf = jax.ShapeDtypeStruct(
        (3, 8, 4, 5),
        jnp.float32,
        sharding=NamedSharding(mesh, PartitionSpec(None, "expert", "fsdp")),
    )
    stored = layout.to_stored({"layers": {"block_0": {"moe": {"w_up": leaf}}}}, model)
    one = stored["layers"]["02"]["moe"]["w_up"]
    assert one.shape == (8, 4, 5) and one.sharding.spec == PartitionSpec("expert", "fsdp")


def test_missing_layers_are_refused(make_config, random_params):
    model = make_config(num_layers=3).model
    stored = layout.to_stored(random_params(model), model)
    del stored["layers"]["01"]
    with pytest.raises(ValueError, match=r"1 of 3 layers of layers/block_0/.* missing \(layers/01"):
        layout.from_stored(stored, model)
    with pytest.raises(ValueError, match="has 3 layers: expected 2"):
        layout.to_stored(random_params(model), make_config(num_layers=2).model)
