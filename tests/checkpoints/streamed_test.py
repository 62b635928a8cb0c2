import dataclasses
import json
import math
import os
import shutil

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from hypothesis import strategies

from olmoe_jax import checkpoints, config, loading, sharding
from olmoe_jax.checkpoints import layout, manifest, partial, streamed
from olmoe_jax.porting import sources
from tests.checkpoints import small

MESHES = {
    "float32": [{"expert": 2, "tensor": 2}],
    "bfloat16": [{"fsdp": 8}, {"expert": 4, "fsdp": 2}],
    "float16": [{"tensor": 2, "fsdp": 4}],
}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    small.parts(monkeypatch)


@pytest.fixture
def run(make_config):
    """A config whose arrays have several slabs."""
    return make_config(num_experts=8)


@pytest.fixture(scope="module")
def written_once(tmp_path_factory, make_config):
    """A directory in bfloat16, its config and its arrays; small parts as above."""
    run, path = make_config(num_experts=8), tmp_path_factory.mktemp("ported") / "model"
    arrays = small.random_arrays(run, "bfloat16")
    with pytest.MonkeyPatch.context() as patch:
        small.parts(patch)
        small.write(path, run, arrays)
    return path, run, arrays


@pytest.fixture
def written(written_once, tmp_path):
    """A copy of it, under another name, that a test may damage."""
    path, run, arrays = written_once
    shutil.copytree(path, tmp_path / "copy")
    return tmp_path / "copy", run, arrays


shapes = strategies.lists(strategies.integers(1, 40), min_size=1, max_size=4).map(tuple)


@hypothesis.given(shapes, strategies.sampled_from(sorted(small.DTYPES)))
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_slabs_are_whole_chunks_of_bounded_size_and_cover_the_array(shape, dtype):
    slabs, chunk = streamed.slabs(shape, dtype), streamed.chunk_shape(shape, dtype)
    itemsize = jnp.dtype(dtype).itemsize
    row = math.prod(shape[1:]) * itemsize
    assert [i for start, stop in slabs for i in range(start, stop)] == list(range(shape[0]))
    assert all(start % chunk[0] == 0 for start, _ in slabs)
    assert math.prod(chunk) * itemsize <= 256
    assert all((stop - start) * row <= 512 or stop - start == 1 for start, stop in slabs)
    if row * shape[0] <= 256:
        assert slabs == [(0, shape[0])] and chunk == shape
    if row <= 128:  # no needless crumbs
        assert all((stop - start) * row > 128 for start, stop in slabs[:-1])


def test_the_real_sizes(monkeypatch):
    monkeypatch.setattr(streamed, "CHUNK", 16 << 20)
    monkeypatch.setattr(streamed, "SLAB", 64 << 20)
    assert streamed.slabs((64, 2048, 1024), "bfloat16") == [(i, i + 16) for i in (0, 16, 32, 48)]
    assert streamed.chunk_shape((64, 2048, 1024), "float32") == (2, 2048, 1024)
    assert streamed.slabs((2048, 2048), "float32") == [(0, 2048)]
    # Mixtral's experts are larger than a slab each; the vocabulary does not divide evenly.
    assert streamed.slabs((8, 4096, 14336), "bfloat16") == [(i, i + 1) for i in range(8)]
    assert streamed.chunk_shape((8, 4096, 14336), "bfloat16") == (1, 512, 14336)
    assert streamed.slabs((50304, 2048), "bfloat16")[-1] == (46440, 50304)


@pytest.mark.parametrize("dtype", small.DTYPES)
def test_every_bit_comes_back_on_any_mesh(dtype, run, tmp_path, same_bits):
    arrays, path = small.random_arrays(run, dtype), tmp_path / "50%20 #1?"
    small.write(path, run, arrays)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert not list(path.rglob(partial.JOURNAL))
    assert len(small.chunks(path, "embedding")) > 1  # zeros are stored too
    leaves = manifest.read(epath.Path(path))
    assert len(leaves["layers/01/moe/w_up"].pieces) == len(streamed.slabs((8, 8, 6), dtype)) > 1
    wanted, abstract = small.params(run, arrays), checkpoints.abstract_params(run.model)
    for sizes in MESHES[dtype]:
        mesh = sharding.make_mesh(config.MeshConfig(**sizes))
        shardings = sharding.parameter_shardings(abstract, mesh)
        read = checkpoints.read_params(path, run.model, shardings, verify=True)
        assert same_bits(read, wanted)
        assert jax.tree.map(lambda x: x.sharding, read) == shardings
    assert same_bits(checkpoints.read_params(path), wanted)
    assert checkpoints.read_config(path) == run


def test_orbax_reads_it_without_us(written, same_bits):
    path, _, arrays = written
    folder, wanted = epath.Path(path / "params"), layout.unflatten(arrays)
    assert same_bits(ocp.PyTreeCheckpointHandler().restore(folder), wanted)
    with ocp.StandardCheckpointer() as reader:
        assert same_bits(reader.restore(folder), wanted)
    mesh = sharding.make_mesh(config.MeshConfig(data=1, fsdp=8))
    split = jax.NamedSharding(mesh, jax.P(None, "fsdp"))
    part = {"lm_head": jax.ShapeDtypeStruct(arrays["lm_head"].shape, jnp.bfloat16, sharding=split)}
    args = ocp.args.PyTreeRestore(
        item=part,
        restore_args=ocp.checkpoint_utils.construct_restore_args(part),
        partial_restore=True,
    )
    read = ocp.PyTreeCheckpointHandler().restore(folder, args=args)
    assert same_bits(read, {"lm_head": arrays["lm_head"]}) and read["lm_head"].sharding == split


def test_orbax_version_1_reads_it_without_us(written, same_bits):
    v1 = pytest.importorskip("orbax.checkpoint.experimental.v1", reason="needs Orbax's version 1")
    path, _, arrays = written
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    tree = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=first), layout.unflatten(arrays)
    )
    assert same_bits(v1.load(path / "params", tree), layout.unflatten(arrays))


def test_a_checkpoint_of_any_name_is_found_and_loaded(written, same_bits):
    path, run, arrays = written
    assert checkpoints.find(path) == path and sources.kind_of(path) == sources.ORBAX
    model, params = loading.load(path, verify=True)
    assert model.config == run.model and same_bits(params, small.params(run, arrays))
    for part in ("params", "manifest/process_0.json", "config.json"):
        (path / part).rename(path / "away")
        with pytest.raises(FileNotFoundError, match=f"neither a checkpoint .*{part}"):
            checkpoints.find(path)
        with pytest.raises(FileNotFoundError, match=f"missing .*{part} .a checkpoint"):
            sources.kind_of(path)
        (path / "away").rename(path / part)


def test_an_unfinished_one_is_refused_with_the_way_on(written):
    path, _, _ = written
    path.rename(path.with_name("copy.partial"))
    message = "a port or upcycling that did not finish: run the same command again"
    for wanted in (path, path.with_name("copy.partial")):
        for look in (checkpoints.find, sources.kind_of, loading.load, streamed.StreamedReader):
            with pytest.raises(FileNotFoundError, match=message):
                look(wanted)


def test_every_flipped_bit_of_the_arrays_is_noticed(written):
    path, _, _ = written
    rng, files = np.random.default_rng(0), small.chunks(path)
    assert len(files) > 30
    for file in rng.choice(files, 5, replace=False):
        good = file.read_bytes()
        small.flip(file, int(rng.integers(len(good))))
        try:
            checkpoints.read_params(path, verify=True)
        except checkpoints.DamagedError as error:
            name = file.parent.name.replace(".", "/")
            assert f"1 of 27 arrays damaged ({name}), in {path}" in str(error)
        else:  # the edge of a last chunk, beyond the array
            assert len(good) > math.prod(manifest.read(epath.Path(path))[name].shape) * 2
        file.write_bytes(good)
    checkpoints.read_params(path, verify=True)


@pytest.mark.parametrize("verify", [False, True])
def test_a_missing_chunk_is_noticed_when_verified(verify, written):
    path, _, _ = written
    next(iter(small.chunks(path, "layers.01.moe.w_up"))).unlink()  # zarr's sign for zeros
    if verify:
        with pytest.raises(checkpoints.DamagedError, match=r"damaged \(layers/01/moe/w_up\)"):
            checkpoints.read_params(path, verify=True)


@pytest.mark.parametrize("name", ["config.json", "source/tokenizer.json"])
def test_damage_of_the_files_beside_the_arrays_is_noticed(name, written):
    path, _, _ = written
    good = (path / name).read_bytes()
    for position in range(0, len(good), len(good) // 11):
        small.flip(path / name, position)
        with pytest.raises(checkpoints.DamagedError, match=f"{name} is not the one that was saved"):
            checkpoints.read_params(path, verify=True)
        (path / name).write_bytes(good)
    checkpoints.read_params(path, verify=True)
    if name != "config.json":
        (path / name).unlink()
        with pytest.raises(checkpoints.DamagedError, match=f"{name} is missing"):
            loading.load(path, verify=True)


def test_another_dtype_on_the_disk_is_no_silent_cast(written):
    path, _, _ = written
    file = path / "params" / "final_norm.scale" / ".zarray"
    file.write_text(file.read_text().replace("bfloat16", "<f2"))
    with pytest.raises(checkpoints.DamagedError, match="final_norm/scale was read as .*'float16'"):
        checkpoints.read_params(path)
    with pytest.raises(checkpoints.DamagedError, match="final_norm/scale is float16"):
        streamed.StreamedReader(path).read("final_norm/scale")


def test_the_reader_reads_parts_of_what_was_streamed(written):
    path, _, arrays = written
    reader = streamed.StreamedReader(path)
    assert {n: (x.shape, x.dtype) for n, x in reader.leaves.items()} == {
        n: (x.shape, "bfloat16") for n, x in arrays.items()
    }
    for name, array in arrays.items():
        for start, stop in ((0, None), (1, 4), (len(array) - 2, len(array))):
            rows = reader.read(name, start, stop)
            assert rows.dtype == array.dtype
            assert rows.tobytes() == array[start:stop].tobytes()


def test_the_reader_fills_the_array_that_it_is_given(written):
    path, _, arrays = written
    reader, out = streamed.StreamedReader(path), np.empty((3, 8, 6), jnp.bfloat16)
    for start in (0, 4):
        rows = reader.read("layers/01/moe/w_up", start, start + 3, out=out)
        assert rows is out
        assert out.tobytes() == arrays["layers/01/moe/w_up"][start : start + 3].tobytes()
    for bad in (out[:2], out.astype(np.float16), np.asfortranarray(out)):
        with pytest.raises(ValueError, match=r"must be row-major bfloat16 \(3, 8, 6\)"):
            reader.read("layers/01/moe/w_up", 0, 3, out=bad)


def test_the_reader_reads_checkpoints_of_a_run(run, tmp_path, random_params):
    params = random_params(run.model)
    with checkpoints.Checkpoints(tmp_path / "run", run) as kept:
        kept.save_params(3, params)
    reader = streamed.StreamedReader(tmp_path / "run")
    assert reader.path.name == "step3-tokens0K"
    wanted = layout.flatten(layout.to_stored(params, run.model))
    assert set(reader.leaves) == set(wanted)
    for name, array in wanted.items():
        assert reader.read(name, 2, 4).tobytes() == np.asarray(array)[2:4].tobytes()
    (reader.path / "params").rename(reader.path / "state")
    with pytest.raises(FileNotFoundError, match="no folder params; a resume state"):
        streamed.StreamedReader(tmp_path / "run")


def test_the_reader_says_what_cannot_be_read(written):
    path, _, _ = written
    small.chunks(path, "lm_head")[0].write_bytes(b"")
    with pytest.raises(checkpoints.DamagedError, match="checkpoint copy: lm_head cannot be read"):
        streamed.StreamedReader(path).read("lm_head")
    os.remove(path / "params" / "embedding" / ".zarray")
    with pytest.raises(checkpoints.DamagedError, match="checkpoint copy: embedding cannot be read"):
        streamed.StreamedReader(path).read("embedding", 1, 2)


def test_a_whole_train_state_is_one_too(run, tmp_path, make_state, same_bits):
    state = make_state(run.model)
    arrays = {n: np.asarray(x) for n, x in layout.flatten(state).items()}
    assert {x.dtype.name for x in arrays.values()} == {"float32", "int32", "uint32"}
    leaves = {n: (x.shape, x.dtype) for n, x in arrays.items()}
    record = json.dumps({"config": dataclasses.asdict(run), "step": 7})
    path = tmp_path / "step7-tokens0K"

    def write(stop_after):
        with streamed.StreamedWriter(
            path, leaves, config_json=record, files={}, job={}, item="state"
        ) as opened:
            pending = opened.pending()
            for name, start, stop in pending[:stop_after]:
                opened.write(
                    name, start, arrays[name][start:stop] if arrays[name].ndim else arrays[name]
                )
            if stop_after is None:
                opened.finish()
        return len(pending)

    assert write(9) == write(None) + 9
    assert same_bits(checkpoints.read_state(path, jax.eval_shape(lambda: state)), state)
    reader = streamed.StreamedReader(path, item="state")
    for name, array in arrays.items():
        assert reader.read(name).tobytes() == array.tobytes()
    with pytest.raises(FileNotFoundError, match="no folder params; a resume state"):
        streamed.StreamedReader(path)
