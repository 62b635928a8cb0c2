"""Train steps of MaxText: the peer of the suite `maxtext_step`.

Its block of Qwen3-MoE is the one of work A with QK-norm over each head. Its package asks for none
of the libraries that it imports; for what is used here, on Python 3.12, `pip install maxtext` and

    absl-py aqtp array-record chex datasets drjax etils flax grain huggingface_hub jax jaxtyping
    jsonlines ml-collections numpy omegaconf optax orbax-checkpoint pandas parameterized
    pathwaysutils pillow psutil pydantic qwix sentencepiece tensorboardx tiktoken tokamax
    transformers

The Google Cloud clients that it would like are not needed: DECOUPLE_GCLOUD.
"""

import os

import serving  # first: MaxText prints when it is imported

os.environ["DECOUPLE_GCLOUD"] = "TRUE"

import importlib.metadata
import pathlib
import platform
import re
import time

import jax
import maxtext
import numpy as np
from flax import nnx
from flax.core import spmd
from maxtext.configs import pyconfig
from maxtext.trainers.pre_train import train
from maxtext.utils import sharding, train_utils

# Both dropless. "ragged": jax.lax.ragged_dot, its way where there is no TPU kernel; "dense": every
# expert for every token.
VARIANTS = {
    "ragged": {"sparse_matmul": True, "megablox": False},
    "dense": {"sparse_matmul": False},
}
# Ours, below layers/NN → theirs, below decoder/layers, and the shape of one layer: h heads.
LAYER = {
    "attention_norm/scale": ("pre_self_attention_layer_norm/scale", None),
    "attention/query": ("self_attention/query/kernel", "dhc"),
    "attention/key": ("self_attention/key/kernel", "dhc"),
    "attention/value": ("self_attention/value/kernel", "dhc"),
    "attention/output": ("self_attention/out/kernel", "hcd"),
    "attention/query_norm/scale": ("self_attention/query_norm/scale", None),
    "attention/key_norm/scale": ("self_attention/key_norm/scale", None),
    "ffn_norm/scale": ("post_self_attention_layer_norm/scale", None),
    "moe/router": ("moe_block/gate/kernel", None),
    "moe/w_gate": ("moe_block/wi_0", None),
    "moe/w_up": ("moe_block/wi_1", None),
    "moe/w_down": ("moe_block/wo", None),
}
_RUN = {}


def describe():
    """Versions and what there is to choose from."""
    packages = ("maxtext", "jax", "flax")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), "variants": list(VARIANTS), **versions}


def open(folder, model, dtype, batch_size, balance_weight, clip_norm, optimizer):
    """Says what all runs share; `start` begins one.

    Args:
      folder: holds batches.npy, int32 [batches, b, l] (step n takes batch n modulo their number),
        and weights/NAME.npy, float32, a "." in NAME where ours has a "/".
      model: numbers that describe it, by the names of our ModelConfig.
      balance_weight: of the load-balancing loss, which is taken per sequence and layer.
      optimizer: by the names of our OptimizerConfig.
    """
    folder = pathlib.Path(folder)
    batches = np.load(folder / "batches.npy")
    settings = {
        "run_name": "benchmark",
        "base_output_directory": str(folder / "output"),
        "hardware": "cpu" if jax.default_backend() == "cpu" else "gpu",
        "skip_jax_distributed_system": True,
        "enable_checkpointing": False,
        "dataset_type": "synthetic",
        "decoder_block": "qwen3_moe",
        "base_emb_dim": model["d_model"],
        "base_num_query_heads": model["num_heads"],
        "base_num_kv_heads": model["num_heads"],
        "head_dim": model["d_model"] // model["num_heads"],
        "base_mlp_dim": model["d_ff"],
        "base_moe_mlp_dim": model["d_ff"],
        "base_num_decoder_layers": model["num_layers"],
        "vocab_size": model["vocab_size"],
        "num_experts": model["num_experts"],
        "num_experts_per_tok": model["num_experts_per_token"],
        "mlp_activations": "[silu,linear]",
        "use_qk_norm": True,
        "rope_max_timescale": int(model["rope_theta"]),
        "normalization_layer_epsilon": model["norm_eps"],
        "logits_via_embedding": False,
        "attention": "dot_product",
        "remat_policy": "minimal",  # recomputing all, its default, is slower
        "per_device_batch_size": batch_size,
        "max_target_length": batches.shape[-1],
        "enable_dropout": False,
        "dtype": dtype,
        "weight_dtype": dtype,
        "load_balance_loss_weight": balance_weight,
        "gradient_clipping_threshold": clip_norm,
        "learning_rate": optimizer["learning_rate"],
        "learning_rate_final_fraction": 1.0,
        "warmup_steps_fraction": 0.0,
        "adam_b1": optimizer["beta1"],
        "adam_b2": optimizer["beta2"],
        "adam_eps": optimizer["eps"],
        "adam_weight_decay": optimizer["weight_decay"],
        "steps": 1000,
    }
    weights = {file.stem: np.load(file) for file in (folder / "weights").glob("*.npy")}
    _RUN.update(settings=settings, batches=batches, weights=weights, layers=model["num_layers"])
    return {}


def start(variant):
    """The weights again, with one of VARIANTS; compiles. {"seconds": for that}."""
    begun = time.perf_counter()
    for name in ("state", "step"):
        _RUN.pop(name, None)
    base = pathlib.Path(maxtext.__file__).parent / "configs" / "base.yml"
    settings = _RUN["settings"] | VARIANTS[variant]
    words = [f"{key}={str(x).lower() if isinstance(x, bool) else x}" for key, x in settings.items()]
    config = pyconfig.initialize(["train", str(base), *words])
    found = train_utils.setup_train_loop(config, None)
    shardings, mesh, state = found[2], found[4], found[-1]
    nnx.update(state.model, _with_weights(nnx.state(state.model, nnx.Param)))
    graph, state = nnx.split(state)
    params, shardings = sharding.maybe_update_params_sharding_with_opt(config, shardings)
    step, _ = train_utils.jit_train_and_eval_step(
        config, graph, mesh, state, shardings, train.train_step, None, None, params
    )
    with jax.set_mesh(mesh), spmd.logical_axis_rules(config.logical_axis_rules):
        step = step.lower(state, _batch(0)).compile()
    _RUN.update(state=state, step=step, number=0)
    return {"seconds": time.perf_counter() - begun}


def steps(count):
    """{"seconds": of all, "losses": cross entropy plus weighted load-balancing loss of each}."""
    losses, batches = [], [_batch(_RUN["number"] + n) for n in range(count)]
    begun = time.perf_counter()
    for batch in batches:
        _RUN["state"], metrics = _RUN["step"](_RUN["state"], batch)
        losses.append(metrics["scalar"]["learning/loss"])
    jax.block_until_ready((_RUN["state"], losses))
    _RUN["number"] += count
    return {"seconds": time.perf_counter() - begun, "losses": [float(loss) for loss in losses]}


def _batch(number):
    """The last position predicts nothing, as with us."""
    tokens = _RUN["batches"][number % len(_RUN["batches"])]
    position = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    real = np.ones(tokens.shape, np.int32)
    is_target = real.copy()
    is_target[:, -1] = 0
    batch = {
        "inputs": tokens,
        "inputs_position": position,
        "inputs_segmentation": real,
        "targets": np.roll(tokens, -1, axis=1),
        "targets_position": position,
        "targets_segmentation": is_target,
    }
    return {name: jax.numpy.asarray(value) for name, value in batch.items()}


def _with_weights(state):
    """Their parameters with our values; they stack layers along the second axis."""
    weights, tree = dict(_RUN["weights"]), nnx.to_pure_dict(state)

    def put(path, value):
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node[folder]
        node[name] = jax.numpy.asarray(value.reshape(node[name].shape), node[name].dtype)

    put("token_embedder/embedding", weights.pop("embedding"))
    put("decoder/decoder_norm/scale", weights.pop("final_norm.scale"))
    put("decoder/logits_dense/kernel", weights.pop("lm_head").T)
    heads = _RUN["settings"]["base_num_query_heads"]
    for ours, (theirs, axes) in LAYER.items():
        pattern = re.compile(rf"layers\.\d+\.{re.escape(ours.replace('/', '.'))}")
        names = sorted(name for name in weights if pattern.fullmatch(name))
        parts = [weights.pop(name) for name in names]
        if axes == "dhc":
            parts = [x.reshape(x.shape[0], heads, -1) for x in parts]
        elif axes == "hcd":
            parts = [x.reshape(heads, -1, x.shape[1]) for x in parts]
        put(f"decoder/layers/{theirs}", np.stack(parts, axis=1))
    if weights:
        raise ValueError(f"no place in MaxText's model for {sorted(weights)[0]}")
    nnx.replace_by_pure_dict(state, tree)
    return state


if __name__ == "__main__":
    serving.serve({"describe": describe, "open": open, "start": start, "steps": steps})
