"""A tiny model's arrays, written in small slabs, for the tests of `streamed`."""

import dataclasses
import json
import re

import jax.numpy as jnp
import numpy as np

from olmoe_jax import checkpoints
from olmoe_jax.checkpoints import layout, streamed

JOB = {"input": "a folder", "dtype": None}
TOKENIZER = b'{"version": "1.0",\r\n "\xc3\xa9": [1, 2]}'
DTYPES = {"float32": np.uint32, "bfloat16": np.uint16, "float16": np.uint16}


def parts(monkeypatch):
    """Chunks of 256 and slabs of 512 bytes, so that small arrays have many."""
    monkeypatch.setattr(streamed, "CHUNK", 256)
    monkeypatch.setattr(streamed, "SLAB", 512)


def random_arrays(run, dtype="float32"):
    """{stored name: array} of random bits, NaNs among them, but the embedding, which is zero."""
    abstract = layout.to_stored(checkpoints.abstract_params(run.model), run.model)
    rng, bits = np.random.default_rng(0), DTYPES[dtype]
    arrays = {
        name: rng.integers(0, np.iinfo(bits).max, leaf.shape, bits, True).view(jnp.dtype(dtype))
        for name, leaf in layout.flatten(abstract).items()
    }
    arrays["embedding"] = np.zeros_like(arrays["embedding"])
    return arrays


def writer(path, run, arrays, job=JOB):
    """A writer of `arrays`, and of a tokenizer that travels along."""
    record = {"config": dataclasses.asdict(run), "step": None, "ported": {"family": "olmoe"}}
    return streamed.StreamedWriter(
        path,
        {name: (array.shape, array.dtype) for name, array in arrays.items()},
        config_json=json.dumps(record),
        files={"source/tokenizer.json": TOKENIZER},
        job=job,
    )


def write(path, run, arrays):
    """Writes all of `arrays` to `path`."""
    with writer(path, run, arrays) as opened:
        for name, start, stop in opened.pending():
            opened.write(name, start, arrays[name][start:stop])
        opened.finish()


def params(run, arrays):
    """The training tree of {stored name: array}, made without JAX."""
    out = {}
    for name in layout.flatten(checkpoints.abstract_params(run.model)):
        names = layout.stored_names(name, run.model)
        whole = np.stack([arrays[n] for n in names]) if layout.is_stacked(name) else arrays[name]
        out[name] = whole
    return layout.unflatten(out)


def flip(file, position):
    """Changes one bit of a file."""
    data = bytearray(file.read_bytes())
    data[position] ^= 4
    file.write_bytes(bytes(data))


def chunks(path, name="*"):
    """The files that hold the data of the arrays in a directory."""
    return [f for f in path.glob(f"params/{name}/*") if re.fullmatch(r"[0-9.]+[0-9]", f.name)]
