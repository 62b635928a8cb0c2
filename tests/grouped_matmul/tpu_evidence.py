"""What the grouped products become on one TPU chip, compiled on a machine that has none.

    python -m tests.grouped_matmul.tpu_evidence

prints the table of olmoe_jax/grouped_matmul/README.md: one OLMoE-1B-7B MoE feed-forward layer,
forward and backward, in bfloat16, for 4,096 tokens. Needs `pip install "jax[tpu]"`, and tokamax for
its rows. About a minute.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
import re
import time
import unittest.mock

# Before libtpu is loaded: there is no TPU to ask, and several processes may compile at once.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from olmoe_jax.model.experts import grouped

CHIPS = {"v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
TOKENS, D, EXPERTS, D_FF, K = 4096, 2048, 64, 1024, 8
SLOTS = TOKENS * K
# Three products forward and six backward, a multiplication and an addition each.
FLOPS = 9 * 2 * SLOTS * D * D_FF


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One compiled layer.

    Attributes:
      seconds: of compilation.
      temporary_bytes: beside arguments and results.
      flops: floating-point operations, over those that the products need.
      weight_copies: how often all weights of one of the three matrices are copied.
    """

    seconds: float
    temporary_bytes: int
    flops: float
    weight_copies: int


def compile_layer(backend, chip, *, tokens=TOKENS):
    """Forward and backward pass of the layer for one chip → Compiled."""
    device = topologies.get_topology_desc(CHIPS[chip], "tpu").devices[0]
    there = jax.sharding.SingleDeviceSharding(device)

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=there)

    def loss(x, factors, w_gate, w_up, w_down, expert_ids, d_y):
        y = grouped.compute(
            x, expert_ids, factors, w_gate, w_up, w_down, num_slots=expert_ids.size, backend=backend
        )
        return jnp.sum(y.astype(jnp.float32) * d_y)

    x, into = array(tokens, D), array(EXPERTS, D, D_FF)
    step = jax.jit(jax.value_and_grad(loss, argnums=range(5)))
    with contextlib.ExitStack() as stack:
        if backend == "tokamax":  # asks for the chip and the platform while it is traced
            from olmoe_jax.grouped_matmul import tokamax

            mesh = jax.sharding.Mesh([device], ("chip",)).abstract_mesh
            stack.enter_context(jax.sharding.use_abstract_mesh(mesh))
            names = {"cpu": tokamax.IMPLEMENTATIONS["tpu"]}
            stack.enter_context(unittest.mock.patch.dict(tokamax.IMPLEMENTATIONS, names))
        started = time.perf_counter()
        compiled = step.lower(
            x, array(tokens, K, dtype=jnp.float32), into, into, array(EXPERTS, D_FF, D),
            array(tokens, K, dtype=jnp.int32), x,
        ).compile()  # fmt: skip
    return Compiled(
        seconds=time.perf_counter() - started,
        temporary_bytes=compiled.memory_analysis().temp_size_in_bytes,
        flops=compiled.cost_analysis()["flops"] / (FLOPS * tokens / TOKENS),
        weight_copies=_weight_copies(compiled.as_text()),
    )


def _weight_copies(text):
    shape = rf"bf16\[{EXPERTS},(?:{D},{D_FF}|{D_FF},{D})\]"
    return len(re.findall(rf"= {shape}\S* (?:copy|transpose)\(", text))


def main():
    print(f"jax {jax.__version__}, libtpu {importlib.metadata.version('libtpu')}\n")
    print("| chip | backend | compiles in | temporaries | FLOPs ÷ needed | weight copies |")
    print("|---|---|---|---|---|---|")
    backends = ["ragged", "megablox"]
    if importlib.util.find_spec("tokamax"):
        backends.append("tokamax")
    for chip in CHIPS:
        for backend in backends:
            c = compile_layer(backend, chip)
            print(
                f"| {chip} | {backend} | {c.seconds:.0f} s | {c.temporary_bytes / 2**20:,.0f} MiB |"
                f" {c.flops:.2f} | {c.weight_copies} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
