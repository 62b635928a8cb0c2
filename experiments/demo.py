"""What `make demo` runs: trains the demo model, judges it, draws it, and says what to try next.

    python -m experiments.demo --config=experiments/configs/demo.py --workdir=runs/demo

Trains on the embedded corpus (overrides such as --config.training.num_steps=20 work as in train),
then checks the result: validation bits per byte against a unigram model, every expert alive, and
the loss with the context shuffled. Done work is not redone. Exits with 1 if the model fails a
check.
"""

import json
import os
import pathlib

from absl import flags

from experiments import app
from olmoe_jax import files

_WORKDIR = flags.DEFINE_string("workdir", "runs/demo", "Directory of the run.")
_CHECK = flags.DEFINE_bool(
    "check", True, "Exit with 1 if the model fails a check; not for short runs."
)
UNIGRAM_MARGIN = 0.25  # bits per byte at least this share below the unigram model
SHUFFLE_MARGIN = 0.10  # loss with a shuffled context at least this share above


def main(argv):
    """Train, judge, draw, print."""
    del argv
    config, workdir = app.config(), pathlib.Path(os.path.expanduser(_WORKDIR.value))
    app.tune_allocator()
    from olmoe_jax.training import loop  # JAX starts after the allocator is set

    result = loop.train(config, workdir)
    if result.signal is not None:
        print(f"stopped at step {result.step}; the same command goes on from there")
        return 128 + result.signal
    summary_path, picture = workdir / "summary.json", workdir / "training.png"
    summary = json.loads(summary_path.read_text()) if summary_path.is_file() else {}
    if summary.get("step") != result.step:
        picture.unlink(missing_ok=True)
        summary = judge(config, workdir, result.record)
        files.write_text(summary_path, json.dumps(summary, indent=2) + "\n")
    if not picture.is_file():
        from olmoe_jax.training import plots  # matplotlib is slow to import

        plots.draw_run(workdir, picture, unigram_loss=summary["unigram_loss"])
    app.write_json(summary)
    return 1 if not show(summary, workdir, picture) and _CHECK.value else 0


def judge(config, workdir, record):
    """Compares the trained model with the baselines; a dict of plain numbers."""
    import jax

    from olmoe_jax import checkpoints, sharding
    from olmoe_jax.model import transformer
    from olmoe_jax.training import runs, validation

    data = runs.open_data(config, workdir, print)
    mesh = sharding.make_mesh(config.mesh)
    model = transformer.Transformer(config.model, routing_group=config.losses.load_balancing_group)
    shardings = sharding.parameter_shardings(checkpoints.abstract_params(config.model), mesh)
    newest = checkpoints.list_checkpoints(workdir)[-1][1]
    params = checkpoints.read_params(newest, config.model, shardings, dtype="float32", verify=True)
    with jax.set_mesh(mesh):
        shuffled = validation.Validator(model, config, data, mesh).measure_shuffled(params)
    unigram = validation.unigram_baseline(data, config)
    domains = {
        name: {
            "bits_per_byte": record[f"validation/{name}/bits_per_byte"],
            "unigram_bits_per_byte": unigram[f"validation/{name}/unigram_bits_per_byte"],
        }
        for name in data.info.domains
        if f"validation/{name}/loss" in record
    }
    return {
        "step": record["step"],
        "loss": record["validation/loss"],
        "unigram_loss": unigram["validation/unigram_loss"],
        "bits_per_byte": record["validation/bits_per_byte"],
        "unigram_bits_per_byte": unigram["validation/unigram_bits_per_byte"],
        "domains": domains,
        "intact_loss": shuffled["validation/intact_loss"],
        "shuffled_loss": shuffled["validation/shuffled_loss"],
        "dead_experts": record.get("validation/dead_experts", 0),
        "expert_backend": json.loads((workdir / "config.json").read_text())["expert_backend"],
    }


def show(summary, workdir, picture):
    """Prints the verdict and what to do next; whether every check passed."""
    below = 1 - summary["bits_per_byte"] / summary["unigram_bits_per_byte"]
    above = summary["shuffled_loss"] / summary["intact_loss"] - 1
    losses = f"{summary['intact_loss']:.2f} → {summary['shuffled_loss']:.2f}"
    checks = [
        (
            below >= UNIGRAM_MARGIN,
            f"{below:.1%} below a unigram model (at least {UNIGRAM_MARGIN:.0%})",
        ),
        (
            above >= SHUFFLE_MARGIN,
            f"shuffling the context raises the loss by {above:.0%} ({losses}; at least "
            f"{SHUFFLE_MARGIN:.0%})",
        ),
        (summary["dead_experts"] == 0, f"{summary['dead_experts']} dead experts (none)"),
    ]  # fmt: skip
    print(f"\nvalidation after {summary['step']} steps, bits per byte (unigram model):")
    rows = {"all": summary} | summary["domains"]
    for name, row in rows.items():
        print(f"  {name:24s} {row['bits_per_byte']:.3f}  ({row['unigram_bits_per_byte']:.3f})")
    for passed, text in checks:
        print(f"  {'ok    ' if passed else 'FAILED'} {text}")
    print(f"""
where everything is:
  picture       {picture}
  metrics       {workdir}/metrics.jsonl   (and {workdir}/tensorboard for TensorBoard)
  checkpoints   {workdir}/checkpoints/    (parameters at every interval, step 0 included)
  train state   {workdir}/resume/
next:
  {app.python()} -m experiments.inspect_batch --workdir={workdir} --step=100
  {app.python()} -m experiments.train --config=experiments/configs/demo.py \\
      --workdir=runs/no_balance --config.losses.load_balancing_weight=0.0
  {app.python()} -m experiments.prepare_data --input='my_corpus/*.jsonl.gz' --output=prepared \\
      --sequence_length=1024""")
    return all(passed for passed, _ in checks)


if __name__ == "__main__":
    app.run(main, flags_with_config=True, flags_with_json=True)
