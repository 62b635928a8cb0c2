"""A tiny Hugging Face folder that needs no other library, and what a folder holds."""

import json
import pathlib

import numpy as np

import olmoe_jax
from olmoe_jax.checkpoints import manifest
from olmoe_jax.data import tokenizer
from olmoe_jax.porting import configs, families, folders, safetensors

MODEL = olmoe_jax.ModelConfig(
    vocab_size=53, max_length=19, num_layers=3, d_model=12, num_heads=2, num_kv_heads=1, d_ff=10,
    num_experts=5, num_experts_per_token=2, init_cutoff=None,
)  # fmt: skip
FILES = {
    "generation_config.json": b'{ "eos_token_id":  3 }\n',
    "tokenizer.json": tokenizer.train(["a text"], vocab_size=tokenizer.MIN_VOCAB_SIZE).json,
    "chat_template.jinja": b"{{ messages }}",
}


def write_folder(
    directory, *, dtype="bfloat16", shards=3, model=MODEL, seed=0, files=FILES, numbers=False
):
    """A Hugging Face folder of random bits, NaNs with payloads among them, or of numbers."""
    directory.mkdir(parents=True)
    config = configs.write(model, dtype=dtype, eos_token_id=3)
    (directory / "config.json").write_text(json.dumps(config, indent=3))
    for name, content in files.items():
        (directory / name).write_bytes(content)
    family, _ = configs.read(config, directory)
    shapes = families.tensor_shapes(families.parts(family, model))
    rng, kind = np.random.default_rng(seed), np.dtype(dtype)
    names, places = list(shapes), {}
    for shard in range(shards):
        one = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        file = "model.safetensors" if shards == 1 else one
        mine = names[shard::shards]  # so an expert's tensors lie in several files
        places |= dict.fromkeys(mine, file)
        header = safetensors.build_header({n: (dtype, shapes[n]) for n in mine})
        with safetensors.Writer(directory / file, header) as writer:
            for name in mine:
                bits = rng.integers(0, 256, (*shapes[name], kind.itemsize), np.uint8)
                values = 0.3 * rng.standard_normal(shapes[name])
                writer.write(name, values.astype(kind) if numbers else bits.view(kind)[..., 0])
    if shards > 1:
        index = {"metadata": {"total_size": 1}, "weight_map": places}
        (directory / folders.INDEX).write_text(json.dumps(index))
    return directory


def contents(directory):
    """{relative name: bytes}, without the manifest that a port adds."""
    files = [p for p in pathlib.Path(directory).rglob("*") if p.is_file()]
    out = {str(p.relative_to(directory)): p.read_bytes() for p in files}
    return {n: b for n, b in out.items() if not n.startswith(manifest.FOLDER)}
