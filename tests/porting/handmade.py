"""Foreign folders made of single tensors, and what must not run when one is read."""

import json
import os

import ml_dtypes  # noqa: F401  names its dtypes
import numpy as np

from olmoe_jax.porting import safetensors

EXPERT = "model.layers.0.mlp.experts.{}.gate_proj.weight"


def array(dtype, shape, seed=0):
    """Random bits, NaNs with payloads among them."""
    rng = np.random.default_rng([seed, *shape])
    return rng.integers(0, 256, (*shape, np.dtype(dtype).itemsize), np.uint8).view(dtype)[..., 0]


def tensors():
    """{name: array} of three dtypes."""
    out = {EXPERT.format(e): array("bfloat16", (5, 3), e) for e in range(4)}
    return out | {
        "model.norm.weight": array("float32", (3,)),
        "lm_head.w": array("float16", (7,)),
    }


def write(path, tensors):
    """A file of safetensors."""
    kinds = {name: (array.dtype, array.shape) for name, array in tensors.items()}
    with safetensors.Writer(path, safetensors.build_header(kinds)) as writer:
        for name, array in tensors.items():
            writer.write(name, array)


def begin(path, **fields):
    """Makes a Hugging Face folder that lacks its weights."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "olmoe", **fields}))
    return path


def check(folder, tensors):
    """That an open folder has these tensors, bit for bit."""
    assert folder.tensors.keys() == tensors.keys()
    for name, array in tensors.items():
        located, found = folder.tensors[name], folder.read(name)
        assert (located.dtype, located.shape) == (array.dtype.name, array.shape)
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        assert found.tobytes() == array.tobytes()
        assert not found.flags.writeable


def to_torch(array):
    """A tensor with the bits of `array`."""
    import torch

    bits = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    return torch.from_numpy(array.view(f"i{array.itemsize}").copy()).view(bits[array.dtype.name])


class Hostile:
    """Makes the directory `path` when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)
