import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmoe_jax import checkpoints, config, loading, sharding
from olmoe_jax.model import transformer
from olmoe_jax.porting import folders, sources


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """A workdir with the checkpoints of steps 2 and 11, and the parameters of both."""
    workdir = tmp_path_factory.mktemp("run")
    run = config.Config(
        model=config.ModelConfig(
            vocab_size=19, num_layers=2, d_model=32, num_heads=2, num_kv_heads=1, d_ff=24,
            num_experts=4, num_experts_per_token=2, max_length=16,
        ),
        data=config.DataConfig(sequence_length=16),
        losses=config.LossesConfig(load_balancing_group=2),
        training=config.TrainingConfig(batch_size=4),
    )  # fmt: skip
    model, params = transformer.Transformer(run.model), {}
    init = jax.jit(model.init)
    with checkpoints.Checkpoints(workdir, run) as kept:
        for step in (2, 11):
            params[step] = init(jax.random.key(step), jnp.zeros((1, 3), jnp.int32))["params"]
            kept.save_params(step, params[step])
    return workdir, run, params


@pytest.fixture
def trained(once, tmp_path):
    """A copy of it that a test may damage."""
    workdir, run, params = once
    shutil.copytree(workdir, tmp_path / "run")
    return tmp_path / "run", run, params


def _equal(a, b):
    return jax.tree.all(
        jax.tree.map(lambda x, y: bool((x == y).all()) and x.dtype == y.dtype, a, b)
    )


def test_a_workdir_gives_its_newest_checkpoint(trained):
    workdir, run, params = trained
    model, loaded = loading.load(workdir, verify=True)
    assert model == transformer.Transformer(run.model, routing_group=2)
    assert _equal(loaded, params[11])
    input_ids = np.array([[3, 1, 4]], np.int32)
    apply = jax.jit(lambda p: model.apply({"params": p}, input_ids).logits)
    np.testing.assert_array_equal(apply(loaded), apply(params[11]))


def test_one_checkpoint_gives_that_one(trained):
    workdir, _, params = trained
    assert _equal(loading.load(str(workdir / "checkpoints" / "step2-tokens0K"))[1], params[2])


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.bfloat16, jnp.dtype("bfloat16")])
def test_dtype_is_of_parameters_and_computation(dtype, trained):
    workdir, _, params = trained
    model, loaded = loading.load(workdir, dtype=dtype)
    assert model.config.dtype == "bfloat16"
    assert _equal(loaded, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params[11]))


def test_an_unknown_dtype_is_refused(trained):
    with pytest.raises(ValueError, match="dtype is 'flot32'.*float32, bfloat16"):
        loading.load(trained[0], dtype="flot32")


def test_sharding_may_be_a_mesh_one_sharding_or_a_tree(trained):
    workdir, _, params = trained
    mesh = sharding.make_mesh(config.MeshConfig(data=1, fsdp=2, expert=4))
    by_table = sharding.parameter_shardings(params[11], mesh)
    last = jax.sharding.SingleDeviceSharding(jax.devices()[-1])
    for given, wanted in (
        (mesh, by_table),
        (by_table, by_table),
        (last, jax.tree.map(lambda _: last, by_table)),
    ):
        loaded = loading.load(workdir, sharding=given)[1]
        assert jax.tree.map(lambda x: x.sharding, loaded) == wanted
        assert _equal(jax.device_get(loaded), jax.device_get(params[11]))


def test_damage_is_found_when_asked(trained):
    workdir, _, _ = trained
    folder = checkpoints.find(workdir) / "params" / "ocdbt.process_0" / "d"
    file = max(folder.iterdir(), key=lambda f: f.stat().length)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="step11-tokens0K: .* arrays damaged"):
        loading.load(workdir, verify=True)


def _files(folder, **texts):
    folder.mkdir()
    for name, text in texts.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_kinds_are_recognised(trained, tmp_path):
    workdir, _, _ = trained
    assert sources.kind_of(workdir) == sources.WORKDIR
    assert sources.kind_of(workdir / "checkpoints" / "step2-tokens0K") == sources.CHECKPOINT
    olmoe = json.dumps({"model_type": "olmoe"})
    one = _files(tmp_path / "one", config__json=olmoe, model__safetensors="")
    shards = _files(tmp_path / "shards", config__json=olmoe)
    (shards / "model-00001-of-00003.safetensors").write_text("")
    original = _files(tmp_path / "original", config__yaml="model: {}", model__pt="")
    revision = _files(tmp_path / "step5-tokens1B", config__json=olmoe, model__safetensors="")
    for folder in (one, shards, revision):
        assert sources.kind_of(folder) == folders.HUGGING_FACE
    assert sources.kind_of(original) == folders.OLMO
    copy = shutil.copytree(workdir / "checkpoints" / "step2-tokens0K", tmp_path / "copy")
    assert sources.kind_of(copy) == sources.ORBAX


def test_a_foreign_folder_has_hashes_only_where_a_port_wrote_it(trained, tmp_path):
    assert loading.has_hashes(trained[0])
    olmoe = json.dumps({"model_type": "olmoe"})
    folder = _files(tmp_path / "one", config__json=olmoe, model__safetensors="")
    assert not loading.has_hashes(folder)
    (folder / "manifest").mkdir()
    assert loading.has_hashes(folder)


def test_a_path_that_holds_no_model_says_what_was_looked_for(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="typo: no such directory; expected a run's workdir"
    ):
        loading.load(tmp_path / "typo")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="file: a file; expected"):
        loading.load(tmp_path / "file")
    with pytest.raises(
        FileNotFoundError, match="it holds nothing; missing checkpoints/ .a workdir., params and"
    ):
        loading.load(_files(tmp_path / "empty"))
    with pytest.raises(
        FileNotFoundError, match=r"missing .*\*\.safetensors \(Hugging Face\); expected"
    ):
        loading.load(_files(tmp_path / "no_weights", config__json='{"model_type": "olmoe"}'))
    with pytest.raises(
        FileNotFoundError, match="it holds model.safetensors; missing .*config.json"
    ):
        loading.load(_files(tmp_path / "no_config", model__safetensors=""))
    orbax = _files(tmp_path / "orbax", config__json="{}", _CHECKPOINT_METADATA="{}")
    with pytest.raises(
        FileNotFoundError, match="missing .*params and manifest/process_0.json .a checkpoint"
    ):
        loading.load(orbax)
    (tmp_path / "early" / "checkpoints" / "step0-tokens0K.orbax-checkpoint-tmp").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="a workdir without a finished checkpoint"):
        loading.load(tmp_path / "early")
    with pytest.raises(FileNotFoundError, match="a save that did not finish"):
        loading.load(tmp_path / "early" / "checkpoints" / "step0-tokens0K.orbax-checkpoint-tmp")
