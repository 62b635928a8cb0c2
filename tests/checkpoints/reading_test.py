import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from olmoe_jax import checkpoints, config, sharding
from olmoe_jax.checkpoints import manifest


def _abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _mesh(devices, **sizes):
    return sharding.make_mesh(config.MeshConfig(**{"data": 1, **sizes}), jax.devices()[:devices])


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory, make_config, random_params):
    """A workdir with one checkpoint, written from four devices, its config and its parameters.

    Arrays under a kilobyte lie in the store's index, which has checksums; here most are larger.
    """
    run = make_config(num_layers=4, moe_every=2, d_model=64, d_ff=24)
    abstract = checkpoints.abstract_params(run.model)
    params = random_params(run.model, sharding.parameter_shardings(abstract, _mesh(4, fsdp=4)))
    workdir = tmp_path_factory.mktemp("run")
    with checkpoints.Checkpoints(workdir, run) as kept:
        kept.save_params(400, params)
    return workdir, run, params


@pytest.fixture
def saved(saved_once, tmp_path):
    """A copy of it that a test may damage."""
    workdir, run, params = saved_once
    shutil.copytree(workdir, tmp_path / "run")
    return tmp_path / "run", run, params


def _path(workdir):
    return epath.Path(checkpoints.find(workdir))


def _data_files(path, item="params"):
    """The files that hold array data: the large ones of the store."""
    return sorted((path / item / "ocdbt.process_0" / "d").iterdir(), key=lambda f: -f.stat().length)


def _flip(file, position=None):
    data = bytearray(file.read_bytes())
    data[len(data) // 2 if position is None else position] ^= 16
    file.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "devices, sizes", [(1, {}), (8, {"fsdp": 8}), (8, {"expert": 4, "fsdp": 2}), (2, {"tensor": 2})]
)
@pytest.mark.parametrize("verify", [False, True])
def test_any_mesh_reads_the_same_bits(devices, sizes, verify, saved, same_bits):
    workdir, run, params = saved
    shardings = sharding.parameter_shardings(params, _mesh(devices, **sizes))
    read = checkpoints.read_params(workdir, run.model, shardings, verify=verify)
    assert same_bits(read, params)
    for leaf, wanted in zip(jax.tree.leaves(read), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding == wanted


def test_pieces_are_those_of_the_mesh_that_wrote(saved):
    leaves = manifest.read(_path(saved[0]))
    assert len(leaves["layers/01/moe/w_gate"].pieces) == 4
    assert len(leaves["layers/01/ffn_norm/scale"].pieces) == 1


def test_without_a_sharding_parameters_are_on_the_first_device(saved, same_bits):
    workdir, _, params = saved
    read = checkpoints.read_params(workdir)
    assert same_bits(read, params)
    assert {d for leaf in jax.tree.leaves(read) for d in leaf.devices()} == {jax.devices()[0]}


def test_dtype_is_converted_when_asked(saved, same_bits):
    workdir, _, params = saved
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    assert same_bits(checkpoints.read_params(workdir, dtype="bfloat16", verify=True), half)
    assert same_bits(checkpoints.read_params(workdir, dtype=jnp.bfloat16), half)


@pytest.mark.parametrize(
    "shape", [{}, {"tie_embeddings": True}, {"num_experts": 0}, {"num_layers": 12}]
)
def test_architectures_come_back(shape, tmp_path, make_config, random_params, same_bits):
    run = make_config(**shape)
    params = random_params(run.model)
    with checkpoints.Checkpoints(tmp_path, run) as kept:
        kept.save_params(1, params)
    assert same_bits(checkpoints.read_params(tmp_path, run.model, verify=True), params)


def test_a_checkpoint_alone_can_be_read(saved, tmp_path_factory, same_bits):
    workdir, run, params = saved
    alone = tmp_path_factory.mktemp("elsewhere") / "step400-tokens25K"
    shutil.copytree(_path(workdir), alone)
    shutil.rmtree(workdir / "checkpoints")
    assert same_bits(checkpoints.read_params(alone, verify=True), params)
    assert checkpoints.read_config(alone) == run


def test_every_flipped_byte_of_array_data_is_noticed(saved, same_bits):
    """A flip in the store is an error that names arrays; in unused bytes, nothing changes."""
    workdir, _, params = saved
    path, rng = _path(workdir), np.random.default_rng(0)
    files = _data_files(path)
    noticed = 0
    for file in files[:4]:
        good = file.read_bytes()
        for position in rng.integers(0, len(good), 3):
            _flip(file, position)
            try:
                read = checkpoints.read_params(workdir, verify=True)
            except ValueError as error:
                noticed += 1
                assert "step400-tokens25K: " in str(error) and "arrays damaged (" in str(error)
            else:
                assert same_bits(read, params), f"silent damage in {file.name} at {position}"
            file.write_bytes(good)
    assert noticed >= 3  # which bytes of the store are in use changes from save to save
    checkpoints.read_params(workdir, verify=True)


def test_the_damaged_arrays_are_named(tmp_path, make_config, make_state):
    run = make_config(d_model=32, d_ff=24)
    state = make_state(run.model)
    with checkpoints.Checkpoints(tmp_path, run) as kept:
        kept.save_state(400, state)
    path = epath.Path(tmp_path / "resume" / "step400-tokens25K")
    # The state is stored without compression, so that an array's bytes can be found in the files.
    wanted = np.asarray(state["opt_state"][1][0].mu["layers"]["block_0"]["moe"]["w_up"]).tobytes()
    (file,) = [f for f in _data_files(path, "state") if wanted in f.read_bytes()]
    _flip(file, file.read_bytes().index(wanted) + 5)
    with pytest.raises(ValueError) as caught:
        checkpoints.read_state(path, _abstract(state))
    assert str(caught.value) == (
        f"checkpoint step400-tokens25K: 1 of {len(jax.tree.leaves(state))} arrays damaged "
        f"(opt_state/1/0/mu/layers/block_0/moe/w_up), in {path}"
    )


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("damage", ["truncated", "deleted", "emptied"])
def test_a_file_cut_short_is_one_clear_error(damage, verify, saved):
    workdir, _, _ = saved
    path = _path(workdir)
    file = _data_files(path)[0]
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[: file.stat().length // 2])
    elif damage == "emptied":
        file.write_bytes(b"")
    else:
        file.unlink()
    with pytest.raises(
        ValueError, match=r"step400-tokens25K: \d+ of 49 arrays damaged \("
    ) as caught:
        checkpoints.read_params(workdir, verify=verify)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize(
    "missing, message",
    [
        ("params", "params is missing|49 of 49 arrays damaged"),
        ("manifest", "manifest/process_0.json is missing"),
        ("manifest/process_0.json", "manifest/process_0.json is missing"),
        ("config.json", "config.json is missing"),
        ("params/manifest.ocdbt", "49 of 49 arrays damaged"),
        ("params/_METADATA", None),
    ],
)
def test_a_missing_item_is_one_clear_error(missing, message, verify, saved, same_bits):
    workdir, _, params = saved
    path = _path(workdir) / missing
    path.rmtree() if path.is_dir() else path.unlink()
    if message is None:  # whether Orbax needs it is its own affair, but never silent or obscure
        try:
            assert same_bits(checkpoints.read_params(workdir, verify=verify), params)
        except ValueError as error:
            assert "step400-tokens25K: params cannot be read" in str(error)
        return
    with pytest.raises(ValueError, match=f"step400-tokens25K: .*({message})") as caught:
        checkpoints.read_params(workdir, verify=verify)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "manifest/process_0.json"])
def test_damage_of_the_small_files_is_noticed(name, saved, same_bits):
    workdir, run, params = saved
    file = _path(workdir) / name
    good = file.read_bytes()
    for position in range(1, len(good), len(good) // 23):
        _flip(file, position)
        try:
            read = checkpoints.read_params(workdir, verify=True)
            assert name != "config.json" and same_bits(read, params)  # a flipped space, or unused
        except ValueError as error:
            assert "step400-tokens25K" in str(error) and "\n" not in str(error)
        file.write_bytes(good)


def test_an_altered_config_is_noticed(saved):
    workdir, run, _ = saved
    file = _path(workdir) / "config.json"
    file.write_text(file.read_text().replace('"rope_theta": 10000.0', '"rope_theta": 10000.5'))
    assert checkpoints.read_config(file.parent) != run
    with pytest.raises(
        ValueError, match="step400-tokens25K: config.json is not the one that was saved"
    ):
        checkpoints.read_params(workdir, verify=True)


def test_another_architecture_is_refused_by_the_fields_that_differ(saved):
    workdir, run, _ = saved
    other = dataclasses.replace(run.model, num_experts=8, d_ff=10)
    with pytest.raises(
        ValueError, match="it has d_ff=24, num_experts=4, this run d_ff=10, num_experts=8"
    ):
        checkpoints.read_params(workdir, other)
    tied = dataclasses.replace(run.model, tie_embeddings=True)
    with pytest.raises(
        ValueError, match=r"1 arrays that are not wanted \(lm_head\); it has tie_emb"
    ):
        checkpoints.read_params(workdir, tied)
    deeper = dataclasses.replace(run.model, num_layers=6)
    with pytest.raises(
        ValueError, match=r"arrays missing \(layers/04/.*num_layers=4, this run num_l"
    ):
        checkpoints.read_params(workdir, deeper)


def test_settings_that_do_not_change_the_parameters_may_differ(saved, same_bits):
    workdir, run, params = saved
    other = dataclasses.replace(run.model, remat=True, dtype="bfloat16", max_length=64)
    assert same_bits(checkpoints.read_params(workdir, other), params)


@pytest.mark.parametrize("devices, sizes", [(1, {}), (8, {"fsdp": 2, "expert": 4})])
def test_a_state_is_restored_onto_another_mesh(
    devices, sizes, tmp_path, make_config, make_state, same_bits
):
    run = make_config()
    state = make_state(run.model)
    placed = jax.device_put(state, sharding.state_shardings(state, _mesh(4, fsdp=4)))
    with checkpoints.Checkpoints(tmp_path, run) as kept:
        kept.save_state(3, placed)
        shardings = sharding.state_shardings(state, _mesh(devices, **sizes))
        wanted = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
        )
        restored = kept.restore_state(wanted)
    assert same_bits(restored, state)
    assert jax.tree.map(lambda x: x.sharding, restored) == shardings


def test_a_state_of_another_dtype_or_shape_is_refused_and_not_cast(
    tmp_path, make_config, make_state
):
    run = make_config(num_experts=16)
    state = make_state(run.model)
    with checkpoints.Checkpoints(tmp_path, run) as kept:
        kept.save_state(3, state)
    wanted = _abstract(state)
    wanted["step"] = jax.ShapeDtypeStruct((), jnp.float32)
    with checkpoints.Checkpoints(tmp_path, run) as kept:
        with pytest.raises(ValueError, match=r"another dtype \(step: int32, wanted float32\)"):
            kept.restore_state(wanted)
    other = make_config(num_experts=64)
    with checkpoints.Checkpoints(tmp_path, other) as kept:
        with pytest.raises(ValueError, match="num_experts=16, this run num_experts=64") as caught:
            kept.restore_state(_abstract(make_state(other.model)))
        assert "delete" not in str(caught.value)
    with checkpoints.Checkpoints(tmp_path, run) as kept:
        with pytest.raises(ValueError, match=r"1 of \d+ arrays missing \(ema\)"):
            kept.restore_state({**_abstract(state), "ema": jax.ShapeDtypeStruct((2,), jnp.float32)})


def test_a_damaged_newest_state_is_named_with_the_way_on(
    tmp_path, make_config, make_state, same_bits
):
    run = make_config(d_model=32, d_ff=24)
    states = {step: make_state(run.model, step) for step in (20, 40)}
    with checkpoints.Checkpoints(tmp_path, run) as kept:
        for step, state in states.items():
            kept.save_state(step, state)
    newest = epath.Path(tmp_path / "resume" / "step40-tokens2K")
    for file in _data_files(newest, "state")[:1]:
        _flip(file)
    with checkpoints.Checkpoints(tmp_path, run) as kept:
        with pytest.raises(
            checkpoints.DamagedError, match="damaged.*delete that directory to resume from step20"
        ) as caught:
            kept.restore_state(_abstract(states[40]))
        assert str(newest) in str(caught.value)
        newest.rmtree()
        assert same_bits(kept.restore_state(_abstract(states[20])), states[20])


def test_parameters_and_moments_can_be_taken_from_a_state(
    tmp_path, make_config, make_state, same_bits
):
    run = make_config(num_layers=4, moe_every=2)
    state = make_state(run.model)
    with checkpoints.Checkpoints(tmp_path, run) as kept:
        kept.save_state(3, state)
    path = tmp_path / "resume" / "step3-tokens0K"
    assert same_bits(checkpoints.read_params(path, verify=True), state["params"])
    assert same_bits(
        checkpoints.read_state(path, _abstract(state))["opt_state"], state["opt_state"]
    )
    with pytest.raises(FileNotFoundError, match="no train state"):
        checkpoints.read_state(tmp_path / "resume", _abstract(state))


def test_a_config_of_an_earlier_version_gets_defaults_for_new_fields(saved):
    workdir, run, _ = saved
    file = _path(workdir) / "config.json"
    text = file.read_text()
    assert '      "remat": false' in text
    file.write_text(text.replace(',\n      "remat": false', ""))
    assert checkpoints.read_config(file.parent) == run
    file.write_text(text.replace('"remat"', '"rematt"'))
    with pytest.raises(ValueError, match="config.model.rematt does not exist"):
        checkpoints.read_config(file.parent)
