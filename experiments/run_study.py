"""Runs a study of a design choice: the same command resumes, and writes the report when all is run.

    python -m experiments.run_study --study=moe_vs_dense --workdir=runs/moe_vs_dense --pilot
    python -m experiments.run_study --study=moe_vs_dense --workdir=runs/moe_vs_dense
    python -m experiments.run_study --study=moe_vs_dense --workdir=runs/moe_vs_dense \
        --arm=dense --seed=2
    python -m experiments.run_study --study=all --workdir=runs/studies --dry_run
    python -m experiments.run_study --study=qk_norm,granularity --workdir=runs/studies

--study names a file of experiments/studies (or any .py file that ends with such a STUDY). The pilot
fixes learning rates and the number of seeds in WORKDIR/protocol.json, which the runs then follow.
With --arm, --seed or both only those runs are made, so that jobs on several machines share the
work. The verdicts are printed; WORKDIR/report.html has the curves, WORKDIR/report.json the numbers.

--data takes prepared data instead of the embedded corpus, --seeds other seeds. Words and windows
are then those of the data, and with them the size of a run: prepare data for the laptop scale with
--vocab_size=1024 --sequence_length=256, for smoke with 1024 and 32.

Several studies, or all, lie in WORKDIR/NAME each; a run that two of them have in common is made
once. Behind the last one comes one table of every study of experiments/studies,
WORKDIR/summary.html, .md and .json; one that was not run stands there with its command. Where that
table or WORKDIR/NAME is, a single study, too, lies in WORKDIR/NAME, and the table is brought up to
date.
"""

import difflib
import importlib.util
import os
import pathlib
import shlex
import sys
import traceback

from absl import flags

from experiments import app
from olmoe_jax.studies import declaration

FOLDER = pathlib.Path(__file__).parent / "studies"
ALL = "all"

_STUDY = flags.DEFINE_string(
    "study", None, "Name of a study, or a .py file; several with commas, or all.", required=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of the study; of several: a folder in it for each.", required=True
)
_SCALE = flags.DEFINE_string("scale", "laptop", "smoke (seconds per run), laptop or paper.")
_ARM = flags.DEFINE_string("arm", None, "Make this arm's runs only.")
_SEED = flags.DEFINE_integer("seed", None, "Make this seed's runs only.")
_SEEDS = flags.DEFINE_list("seeds", None, "Seeds instead of the study's or the protocol's: 4,5,6.")
_DATA = flags.DEFINE_string("data", None, "Prepared data instead of the embedded corpus.")
_PILOT = flags.DEFINE_bool("pilot", False, "Make the pilot and write the protocol, nothing else.")
_PROTOCOL = flags.DEFINE_string(
    "protocol", None, "Protocol to follow; default WORKDIR/protocol.json if it is there."
)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the arms, their costs and the time; stop.")


def main(argv):
    """Flags → studies → runs → reports, and a table where there are several."""
    del argv
    chosen = choose(_STUDY.value)
    seeds = app.seeds(_SEEDS.value)
    several = _STUDY.value == ALL or len(chosen) > 1
    if several:
        for flag in (_ARM, _PROTOCOL):
            if flag.value is not None:
                raise ValueError(f"--{flag.name}={flag.value}: belongs to one --study")
    if _PILOT.value:
        _check_pilot_flags()
    app.tune_allocator()
    app.start_distributed()
    import jax  # starts after the two lines above

    from olmoe_jax.studies import runner, sharing, summary
    from olmoe_jax.training import metrics

    workdir = pathlib.Path(os.path.expanduser(_WORKDIR.value))
    app.share_compiled_programs()
    if not several and not _among_others(workdir, chosen[0].name):
        return _run(chosen[0], workdir, seeds)[0]
    folders, left, planned = [workdir / name for name in names()], 0.0, set()
    for study in chosen:
        folder = workdir / study.name
        if not _DRY_RUN.value:
            runner.link_data(folder, workdir / "data")
        status, plan = _run(study, folder, seeds, others=folders)
        if status:
            return status
        if _DRY_RUN.value and not _PILOT.value:
            left += sharing.seconds_left(plan, planned, folders)
        print()
    if _PILOT.value:
        return 0
    if _DRY_RUN.value:
        print(
            f"{len(chosen)} {'studies' if len(chosen) > 1 else 'study'}, runs in common made once: "
            f"altogether about {metrics.duration(left)} (an estimate)"
        )
    elif not jax.process_index():
        _summarize(summary, workdir)
    return 0


def _run(study, workdir, seeds, others=()):
    """(exit status, plans.Plan) of one study; there is no Plan of a pilot.

    Runs may be taken over from the studies in the folders `others`.
    """
    import jax

    from olmoe_jax.studies import pilot, plans, protocol, report, runner, sharing

    if _PILOT.value:
        if any(workdir.glob("*/seed_*/metrics.jsonl")):
            raise ValueError(
                f"{workdir}: holds runs of the verdict already, and a pilot comes before them; "
                "give another --workdir"
            )
        plan = plans.make_plan(study, workdir, scale=_SCALE.value, data=_DATA.value)
        if _DRY_RUN.value:
            print(pilot.describe(plan))
            return 0, plan
        sharing.adopt_pilot(plan, others)
        found = pilot.run(plan)
        if isinstance(found, int):
            return app.stopped(found), None
        protocol.write(workdir / protocol.FILE, found)
        print(f"\nseeds {list(found.seeds)}, learning rates {found.learning_rates}")
        print("\n".join(f"note: {note}" for note in found.notes))
        print(f"written: {workdir / protocol.FILE}; commit it before the runs that decide")
        app.write_json(found)
        return 0, None
    plan, followed, notes = protocol.plan(
        study, workdir, scale=_SCALE.value, data=_DATA.value, seeds=seeds, path=_PROTOCOL.value
    )
    runner.check_chosen(plan, _ARM.value, _SEED.value)
    if not _DRY_RUN.value:
        sharing.adopt(plan, others)
    print(plans.describe(plan))
    if _DRY_RUN.value:
        return 0, plan
    stopped = runner.make_runs(plan, arm=_ARM.value, seed=_SEED.value)
    if stopped is not None:
        return app.stopped(stopped), plan
    if app.unfinished(plan) or jax.process_index():
        return 0, plan
    content = report.write(plan, protocol=followed, notes=[*notes, *sharing.notes(plan)])
    print(f"\n{report.text(content)}")
    print(f"page: {workdir / report.PAGE}\nnumbers: {workdir / report.DATA}")
    app.write_json(content)
    return 0, plan


def _among_others(workdir, name):
    """Whether a study lies in a folder of its own in a workdir of several."""
    from olmoe_jax.studies import plans, protocol, summary

    begun = (workdir / name / file for file in (protocol.FILE, plans.MARKER))
    return (workdir / summary.DATA).is_file() or any(map(pathlib.Path.is_file, begun))


def _check_pilot_flags():
    """Refuses flags that a pilot does not follow, with what to do instead."""
    for flag in (_ARM, _SEED, _SEEDS, _PROTOCOL):
        if flag.value is not None:
            value = ",".join(flag.value) if isinstance(flag.value, list) else flag.value
            raise ValueError(
                f"--pilot --{flag.name}={value}: a pilot makes all its runs, on seeds of its "
                "own; give one of them"
            )


def _summarize(summary, workdir):
    """Writes the table over all studies that there are, run or not."""
    known = {
        name: {"question": load(name).question, "command": _command(name, workdir)}
        for name in names()
    }
    reports = summary.read(sorted(workdir.glob("*/report.json")))
    table = summary.rows(reports, known)
    summary.write(workdir, table)
    print(summary.markdown(table))
    print(f"page: {workdir / summary.PAGE}\ntable: {workdir / summary.TEXT}")
    app.write_json(table)


def _command(name, workdir):
    """What runs a study as these were, for a shell; `workdir` is theirs, and has the table."""
    flags_ = [f"--study={name}", f"--workdir={workdir}", f"--scale={_SCALE.value}"]
    if _DATA.value is not None:
        flags_.append(f"--data={_DATA.value}")
    if _SEEDS.value is not None:
        flags_.append(f"--seeds={','.join(_SEEDS.value)}")
    return shlex.join([app.python(), "-m", "experiments.run_study", *flags_])


def choose(text) -> list[declaration.Study]:
    """The studies of --study: one, several with commas, or all of experiments/studies.

    Raises:
      ValueError: as `load`; or one is named twice.
    """
    given = [part.strip() for part in text.split(",")]
    wanted = names() if text == ALL else [name for name in given if name]
    if not wanted:
        raise ValueError(f"--study={text}: names no study")
    found = [load(name) for name in wanted]
    if len({study.name for study in found}) < len(found):
        raise ValueError(f"--study={text}: a name occurs twice")
    return found


def names() -> list[str]:
    """The studies of experiments/studies."""
    return sorted(path.stem for path in FOLDER.glob("[a-z]*.py"))


def load(name) -> declaration.Study:
    """The Study of a name or of a .py file.

    Raises:
      ValueError: there is none (all are listed, a line each), or its file does not declare one.
    """
    path = FOLDER / f"{name}.py"
    if name.endswith(".py"):
        path = pathlib.Path(os.path.abspath(os.path.expanduser(name)))
        if not path.is_file():
            raise FileNotFoundError(f"--study={name}: no such file")
    elif not path.is_file():
        known = names()
        near = difflib.get_close_matches(name, known, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        print("studies:")
        for other in known:
            print(f"  {other:24s} {load(other).question}")
        raise ValueError(f"--study={name}: no such study{hint}: there are {', '.join(known)}")
    module = _import(path)
    study = getattr(module, "STUDY", None)
    if not isinstance(study, declaration.Study):
        raise ValueError(f"{path}: must end with STUDY = studies.Study(…)")
    if study.name != path.stem:
        raise ValueError(f"{path}: its study is called {study.name!r}; the name is the file's")
    return study


def _import(path):
    """The module in a file.

    Raises:
      ValueError: whatever it raises, with the file and the line.
    """
    name = f"study_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the file is a program: it may raise anything
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        where = f"{path}:{lines[-1]}" if lines else str(path)
        raise ValueError(f"{where}: {app.message(error)}") from error
    return module


if __name__ == "__main__":
    app.run(main, flags_with_json=True)
