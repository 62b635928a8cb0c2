import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from olmoe_jax.checkpoints import manifest


def _mesh(n):
    return Mesh(np.array(jax.devices()[:n]), ("fsdp",))


def test_digest_is_of_the_row_major_bytes():
    x = np.arange(15, dtype=np.float32).reshape(3, 5)
    assert manifest.digest(x.T) == hashlib.sha256(x.T.tobytes()).hexdigest()
    assert manifest.digest(x.T) != manifest.digest(x)
    assert manifest.digest(np.float32(2)) == hashlib.sha256(np.float32(2).tobytes()).hexdigest()
    half = jnp.asarray(x, jnp.bfloat16)
    assert (
        manifest.digest(np.asarray(half)) == hashlib.sha256(np.asarray(half).tobytes()).hexdigest()
    )


def test_pieces_cover_each_array_once():
    x = np.arange(8 * 6, dtype=np.float32).reshape(8, 6)
    split = jax.device_put(x, NamedSharding(_mesh(4), PartitionSpec("fsdp")))
    copied = jax.device_put(x, NamedSharding(_mesh(4), PartitionSpec()))
    pieces = manifest.own_pieces({"split": split, "copied": copied})
    assert [p[:2] for p in pieces] == [("split", (i, 0)) for i in (0, 2, 4, 6)] + [
        ("copied", (0, 0))
    ]
    np.testing.assert_array_equal(np.concatenate([p[2] for p in pieces[:4]]), x)


def _written(tmp_path, processes):
    folder = tmp_path / "step1-tokens0K" / "manifest"
    folder.mkdir(parents=True)
    for i in range(processes):
        leaf = {"shape": [2 * processes, 3], "dtype": "float32"}
        leaf["pieces"] = [{"start": [2 * i, 0], "shape": [2, 3], "sha256": f"{i}"}]
        record = {"process": i, "process_count": processes, "leaves": {"a/b": leaf}}
        (folder / f"process_{i}.json").write_text(json.dumps(record))
    return epath.Path(folder.parent)


def test_files_of_several_processes_are_put_together(tmp_path):
    leaf = manifest.read(_written(tmp_path, 3))["a/b"]
    assert (leaf.shape, leaf.dtype, leaf.nbytes) == ((6, 3), "float32", 72)
    assert [p.start for p in leaf.pieces] == [(0, 0), (2, 0), (4, 0)]


def test_a_manifest_that_lacks_something_is_refused(tmp_path):
    path = _written(tmp_path, 3)
    last = path / "manifest" / "process_2.json"
    text = last.read_text()
    last.write_text(
        text.replace('"start": [4, 0], "shape": [2, 3]', '"start": [4, 0], "shape": [1, 3]')
    )
    with pytest.raises(ValueError, match=r"step1-tokens0K: manifest is damaged \(pieces of a/b"):
        manifest.read(path)
    last.write_text(text.replace("float32", "float64"))
    with pytest.raises(ValueError, match="process_2.json is damaged"):
        manifest.read(path)
    last.write_text(text[:-9])
    with pytest.raises(ValueError, match="process_2.json is damaged"):
        manifest.read(path)
    last.unlink()
    with pytest.raises(ValueError, match="manifest/process_2.json is missing"):
        manifest.read(path)
