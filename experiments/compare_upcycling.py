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

import dataclasses
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense:
    """A dense model that is there already.

    Attributes:
      base: its Config at the chosen scale: its architecture and, if it was trained here, its data
        and batch size; schedule and length are the scale's.
      start_step: `data.start_step` behind what it has seen.
      tokens: that it was trained on; None: not known.
      notes: lines that a reader should know.
    """

    base: object
    start_step: int
    tokens: int | None
    notes: tuple[str, ...]


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

    from olmoe_jax.studies import protocol, runner, upcycling_page, upcycling_report

    workdir = pathlib.Path(os.path.expanduser(_WORKDIR.value))
    options = {
        "num_experts": _EXPERTS.value,
        "num_experts_per_token": _CHOSEN.value,
        "method": _METHOD.value,
    }
    dense, data = None, _DATA.value
    if _DENSE.value is not None:
        dense, data = open_dense(_DENSE.value, _SCALE.value, data, _DENSE_TOKENS.value), None
        options |= {
            "dense": os.path.abspath(os.path.expanduser(_DENSE.value)),
            "start_step": dense.start_step,
            "base": {_SCALE.value: dense.base},
        }
    study = upcycling.declare(**options)
    followed, notes = protocol.find(workdir, study, _SCALE.value, data=data)
    plan = runner.make_plan(
        study, workdir, scale=_SCALE.value, data=data,
        seeds=seeds or (followed.seeds if followed else None),
        learning_rates=followed.learning_rates if followed else None,
    )  # fmt: skip
    notes += dense.notes if dense else ()
    print(runner.describe(plan), flush=True)
    print("\n".join(f"note: {note}" for note in notes))
    if _DRY_RUN.value:
        return 0
    app.share_compiled_programs()
    stopped = runner.make_runs(plan)
    if stopped is not None:
        return app.stopped(stopped)
    if left := plan.remaining:
        print(f"\n{len(left)} runs are not done yet: " + ", ".join(f"{a} {s}" for a, s in left))
        app.write_json({"study": study.name, "remaining": left})
        return 0
    if jax.process_index():
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


def open_dense(directory, scale, data, tokens) -> Dense:
    """The dense model in a directory, for runs at a scale.

    Args:
      data: prepared data to use instead of its own, or None.
      tokens: that it was trained on, where it does not say so itself; or None.
    Raises:
      FileNotFoundError, ValueError: there is no model, it is a Mixture of Experts, or it does not
        say on which data its runs can go on.
    """
    from olmoe_jax.data import pipeline
    from olmoe_jax.porting import sources
    from olmoe_jax.upcycling import upcycle

    source = sources.open_source(directory)
    if source.config.model.num_experts:
        raise ValueError(
            f"--dense_checkpoint={directory}: a Mixture of Experts "
            f"(num_experts={source.config.model.num_experts}); name a dense model"
        )
    position, notes = upcycle.position_of(source.path, source.config), []
    if position is not None and position.data_path is None and data is None:
        position = None  # away from its run: the data are not to be found
    own = position.data_path if position is not None else None
    path = data or own
    if path is None:
        raise ValueError(
            f"--dense_checkpoint={directory}: was not trained by a run whose data are known here: "
            "name --data, prepared with its tokenizer (experiments.prepare_data --tokenizer)"
        )
    path = os.path.abspath(os.path.expanduser(path))
    info = pipeline.open(path).info
    base = upcycling.BASES[scale]
    training, start_step = base.training, 0
    if own is not None and path == os.path.abspath(own):
        start_step = position.start_step
        training = dataclasses.replace(training, batch_size=source.config.training.batch_size)
        seed = source.config.training.seed
        notes.append(
            f"the dense model read its data in the order of seed {seed}; with another seed the MoE "
            "runs read some of those windows again, which favours the upcycled one"
        )
    elif own is not None and info.tokenizer_sha256 != pipeline.open(own).info.tokenizer_sha256:
        raise ValueError(
            f"--data={path}: has another tokenizer than {own}, on which {directory} was trained; "
            "prepare it with that (experiments.prepare_data --tokenizer)"
        )
    if position is not None and source.config.training.initial_checkpoint is None:
        found = position.step * source.config.tokens_per_step
        if tokens not in (None, found):
            raise ValueError(
                f"--dense_tokens={tokens}: {directory} says that it was trained on {found}"
            )
        tokens = found
    model = dataclasses.replace(
        source.config.model, dtype=base.model.dtype, remat=base.model.remat
    )  # fmt: skip
    config = dataclasses.replace(
        base, model=model, training=training,
        data=dataclasses.replace(base.data, path=path, sequence_length=info.sequence_length),
    )  # fmt: skip
    return Dense(base=config, start_step=start_step, tokens=tokens, notes=tuple(notes))


if __name__ == "__main__":
    app.run(main, flags_with_json=True)
