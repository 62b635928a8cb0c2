"""Trains a model and keeps every checkpoint; running the same line again resumes.

    python -m experiments.train --config=experiments/configs/demo.py --workdir=runs/demo
    python -m experiments.train --config=experiments/configs/tiny_moe.py --workdir=runs/tiny \
        --config.data.path=prepared --config.data.sequence_length=1024

Any field of the config is a flag: --config.optimizer.learning_rate=1e-3. SIGTERM and Ctrl-C save
the state before the process ends with 128 + the signal's number.
"""

import shlex
import sys

from absl import flags

from experiments import app

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print what the run will take, and stop.")
_ALLOW_FULL_DISK = flags.DEFINE_bool(
    "allow_full_disk", False, "Start although all checkpoints will not fit on the disk."
)
_PROFILE = flags.DEFINE_string(
    "profile",
    None,
    "Directory for a JAX profiler trace of three steps; prints which part takes which share.",
)


def main(argv):
    """The binary: flags → config → `olmoe_jax.training.loop.train`."""
    config = app.config()
    app.tune_allocator()
    app.start_distributed()
    from olmoe_jax.training import loop  # JAX starts after the two lines above

    result = loop.train(
        config, _WORKDIR.value, dry_run=_DRY_RUN.value, allow_full_disk=_ALLOW_FULL_DISK.value,
        profile=_PROFILE.value,
    )  # fmt: skip
    if result.signal is not None:
        print(f"stopped before update {result.step + 1}; state saved. To resume:")
        print(f"  {shlex.join([app.python(), '-m', 'experiments.train', *sys.argv[1:]])}")
        return 128 + result.signal
    app.write_json({"step": result.step, "finished": result.finished, "record": result.record})
    return 0


if __name__ == "__main__":
    app.run(main, flags_with_config=True, flags_with_json=True)
