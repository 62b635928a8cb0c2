"""Speed, side by side with the peers and with what the machine can do at best, in one run.

    python -m experiments.benchmark --suite=train_step [--dtype=bfloat16] --peer_python=PYTHON
        [--json=FILE] [--plot=FILE.png]

Each suite is one module of `olmoe_jax.benchmarking`, whose docstring says what it measures. Peers
run in an environment of their own, as subprocesses of its interpreter: --peer_python. Without it a
suite measures us and the machine's own ceiling. Exit status 1: what was computed is wrong.
"""

import importlib

from absl import flags

from experiments import app
from olmoe_jax.benchmarking import options as options_lib

# Each a module of olmoe_jax.benchmarking with `run(options)`, which returns (what --json gets,
# whether what was computed is right); imported when chosen, as JAX must find the allocator tuned.
SUITES = (
    "matmul_peak", "moe_layer", "train_step", "maxtext_step", "experts", "layers", "data",
    "checkpoint", "start_up", "port", "recording",
)  # fmt: skip

_DEFAULT = options_lib.Options()
_SUITE = flags.DEFINE_enum("suite", None, SUITES, "What to measure.")
_ROUNDS = flags.DEFINE_integer(
    "rounds", _DEFAULT.rounds, "Undisturbed rounds; at most as many are repeated."
)
_PEER_PYTHON = flags.DEFINE_string(
    "peer_python",
    None,
    "Interpreter of an environment that holds the peer (torch and transformers; or maxtext).",
)
_DTYPE = flags.DEFINE_enum(
    "dtype", _DEFAULT.dtype, ("float32", "bfloat16"), "Of parameters, moments and products."
)
_EXPERT_BACKEND = flags.DEFINE_string(
    "expert_backend", None, "How experts are computed; moe_layer, experts: default all."
)
_SHAPE = flags.DEFINE_string("shape", _DEFAULT.shape, "moe_layer: a, b2048 or b8192.")
_PRESET = flags.DEFINE_string("preset", _DEFAULT.preset, "port, recording: the architecture.")
_NUM_LAYERS = flags.DEFINE_integer(
    "num_layers", None, "port, recording: fewer layers than the preset has; recording: default 2."
)
_SHARDS = flags.DEFINE_integer("shards", _DEFAULT.shards, "port: files with weights, 1 or more.")
_SCRATCH = flags.DEFINE_string(
    "scratch", _DEFAULT.scratch, "A folder for files, on the disk to measure; left as it was."
)
_PLOT = flags.DEFINE_string("plot", None, "Also draw the result into this PNG.")


def main(argv):
    """Runs one suite; exit status 1 if what it computed is wrong."""
    del argv
    if _SUITE.value not in SUITES:
        raise ValueError(f"--suite={_SUITE.value}: must be one of {', '.join(SUITES)}")
    if _ROUNDS.value < 1:
        raise ValueError(f"--rounds={_ROUNDS.value}: must be at least 1")
    tuned = app.tune_allocator()
    options = options_lib.Options(
        rounds=_ROUNDS.value, scratch=_SCRATCH.value, preset=_PRESET.value,
        num_layers=_NUM_LAYERS.value, shards=_SHARDS.value, peer_python=_PEER_PYTHON.value,
        dtype=_DTYPE.value, expert_backend=_EXPERT_BACKEND.value, shape=_SHAPE.value,
        allocator_tuned=tuned,
    )  # fmt: skip
    suite = importlib.import_module(f"olmoe_jax.benchmarking.{_SUITE.value}")
    result, is_right = suite.run(options)
    app.write_json(result)
    if _PLOT.value is not None:
        from olmoe_jax.benchmarking import plot

        plot.draw(result, _PLOT.value)
    return 0 if is_right else 1


if __name__ == "__main__":
    app.run(main, flags_with_json=True)
