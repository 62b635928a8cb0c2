"""Upcycled against from scratch, start to finish: the same command resumes, and ends with a report.

    python -m experiments.compare_upcycling --workdir=runs/compare
    python -m experiments.compare_upcycling --workdir=runs/mine --data=prepared --seeds=1,2,3,4
    python -m experiments.compare_upcycling --workdir=runs/from_dense --dense_checkpoint=runs/dense

For each seed: trains a dense model, upcycles it and trains on, and trains the same Mixture of
Experts from scratch on the same windows (`experiments/studies/upcycling.py`). Then finds where
scratch catches up and where it overtakes, over tokens, FLOPs and seconds, the dense model's own
training counted or not, and as a share of the dense model's budget; the definitions are in
`olmoe_jax/studies/crossings.py`. A crossing that is not reached is said to be not reached.

--dense_checkpoint is a dense model of any kind that `olmoe_jax.load` takes. One of a run made here
brings its data, its batch size, its place in the data order and its tokens. For any other, name
--data, prepared with its tokenizer, and --dense_tokens; without that no share of its budget is
stated. All seeds then share the dense model.

All rates are the scale's, the same in all arms. For rates chosen by a pilot, run
`experiments.run_study --study=upcycling --workdir=DIR --pilot` first; DIR/protocol.json is then
followed.

Written to WORKDIR: compare.json (every number; `olmoe_jax/studies/upcycling_report.py` explains
it), report.html (curves) and compare.png.
"""

import os
import pathlib

from absl import flags

from experiments import app
from experiments.studies import upcycling
from olmoe_jax.upcycling import recipe as recipe_lib

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the comparison.", required=True)
_SCALE = flags.DEFINE_enum(
    "scale", "laptop", tuple(upcycling.BASES), "smoke: seconds per run; laptop; paper."
)
_SEEDS = flags.DEFINE_list("seeds", None, "Seeds instead of the study's or the protocol's: 4,5,6.")
_DATA = flags.DEFINE_string("data", None, "Prepared data instead of the embedded corpus.")
_DENSE = flags.DEFINE_string("dense_checkpoint", None, "A dense model, instead of training one.")
_DENSE_TOKENS = flags.DEFINE_integer(
    "dense_tokens", None, "Tokens that --dense_checkpoint was trained on, where that is not known."
)
_EXPERTS = flags.DEFINE_integer("num_experts", 8, "Experts of each layer.")
_CHOSEN = flags.DEFINE_integer("num_experts_per_token", 2, "Of them, how many compute a token.")
_METHOD = flags.DEFINE_enum(
    "method", recipe_lib.REFERENCE, recipe_lib.METHODS,
    "As of experiments.upcycle: reference (the paper's), normalized or scaled.",
)  # fmt: skip
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the runs, their costs and the time; stop.")


def main(argv):
    """Flags → study → runs → report."""
    del argv
    seeds = app.seeds(_SEEDS.value)
    if _DENSE_TOKENS.value is not None and (_DENSE.value is None or _DENSE_TOKENS.value < 1):
        raise ValueError(
            f"--dense_tokens={_DENSE_TOKENS.value}: the tokens of --dense_checkpoint, at least 1"
        )
    app.tune_allocator()
    app.start_distributed()
    import jax  # starts after the two lines above

    from olmoe_jax.studies import plans, protocol, runner, upcycling_page, upcycling_report

    workdir = pathlib.Path(os.path.expanduser(_WORKDIR.value))
    options = {
        "num_experts": _EXPERTS.value,
        "num_experts_per_token": _CHOSEN.value,
        "method": _METHOD.value,
    }
    dense, data = None, _DATA.value
    if _DENSE.value is not None:
        dense, data = (
            upcycling.open_dense(_DENSE.value, _SCALE.value, data, _DENSE_TOKENS.value),
            None,
        )
        options |= {
            "dense": os.path.abspath(os.path.expanduser(_DENSE.value)),
            "start_step": dense.start_step,
            "base": {_SCALE.value: dense.base},
        }
    study = upcycling.declare(**options)
    plan, followed, notes = protocol.plan(
        study, workdir, scale=_SCALE.value, data=data, seeds=seeds
    )
    notes += dense.notes if dense else ()
    print(plans.describe(plan), flush=True)
    print("\n".join(f"note: {note}" for note in notes))
    if _DRY_RUN.value:
        return 0
    app.share_compiled_programs()
    stopped = runner.make_runs(plan)
    if stopped is not None:
        return app.stopped(stopped)
    if app.unfinished(plan) or jax.process_index():
        return 0
    comparison = upcycling_report.make(
        plan, dense_tokens=dense.tokens if dense else None, protocol=followed, notes=notes
    )
    upcycling_page.write(comparison)
    print("\n" + "\n".join(f"  {line}" for line in comparison.content["words"]))
    print("\n".join(f"  note: {note}" for note in comparison.content["notes"]))
    for what, name in (
        ("picture", upcycling_report.PICTURE), ("page", upcycling_report.PAGE),
        ("numbers", upcycling_report.DATA),
    ):  # fmt: skip
        print(f"{what:9s}{workdir / name}")
    app.write_json(comparison.content)
    return 0


if __name__ == "__main__":
    app.run(main, flags_with_json=True)
