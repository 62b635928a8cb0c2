"""`experiments.run_study` as a person runs it, and the declarations of `experiments/studies`."""

import ast
import dataclasses
import json
import os
import pathlib
import shlex
import subprocess
import sys
import types

import pytest

from experiments import run_study
from olmoe_jax import config
from olmoe_jax.data import preparation
from olmoe_jax.studies import equality, summary

ROOT = pathlib.Path(__file__).parents[2]


def run(*arguments):
    """(exit status, stdout, stderr) of `python -m experiments.run_study …`."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(
        [str(ROOT), os.environ.get("PYTHONPATH", "")])}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "experiments.run_study", *arguments], cwd=ROOT, env=environment,
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("name", run_study.names())
def test_every_declaration_is_valid_at_every_scale_and_says_how_to_run_it(name):
    study = run_study.load(name)
    assert len(study.question) < 100, "a question has at most 100 characters: tables show it"
    docstring = ast.get_docstring(ast.parse((run_study.FOLDER / f"{name}.py").read_text())) or ""
    assert f"--study={name} " in docstring, "the docstring names the command that runs it"
    for word in ("Paper:", "Command:"):
        assert word in docstring or name == "control", f"the docstring has a paragraph {word}"
    scales = {"smoke", "laptop", "paper"}
    assert scales <= set(study.base), "a study of this folder has every scale: --study=all"


def test_moe_and_dense_are_equal_but_for_the_router():
    study = run_study.load("moe_vs_dense")
    for scale in study.base:
        dense, moe = (equality.cost(c) for c in study.configs(scale).values())
        assert moe.active - moe.router == dense.active and dense.router == 0 < moe.router
    assert [o.measure for o in study.outcomes] == ["final", "tokens", "flops", "seconds"]
    paper = study.configs("paper")["dense"].model
    assert (paper.d_ff, paper.num_experts) == (8192, 0)


def test_an_unknown_study_is_listed_against_what_there_is():
    status, out, error = run("--study=moe_vs_dens", "--workdir=/nonexistent")
    assert status == 2 and "did you mean moe_vs_dense?" in error
    assert error.count("\n") == 1 and error.startswith("error: --study=moe_vs_dens: no such study")
    for name in run_study.names():
        assert f"{name:24s} {run_study.load(name).question}" in out


def test_granularity_and_the_shared_expert_are_those_of_the_paper():
    shapes = [(c.model.num_experts, c.model.num_experts_per_token, c.model.d_ff,
               c.model.num_shared_experts)
              for name in ("granularity", "shared_expert")
              for c in run_study.load(name).configs("paper").values()]  # fmt: skip
    assert shapes == [(8, 1, 8192, 0), (32, 4, 2048, 0), (64, 8, 1024, 0), (128, 16, 512, 0),
                      (32, 4, 2048, 0), (31, 3, 2048, 1)]  # fmt: skip


def test_several_studies_are_chosen_by_commas_and_all_are_all():
    assert [s.name for s in run_study.choose("qk_norm,control")] == ["qk_norm", "control"]
    assert [s.name for s in run_study.choose(" control, qk_norm,")] == ["control", "qk_norm"]
    assert [s.name for s in run_study.choose("all")] == run_study.names()
    with pytest.raises(ValueError, match="a name occurs twice"):
        run_study.choose("control,control")
    status, _, error = run("--study=control,qk_norm", "--workdir=/nonexistent", "--arm=base")
    assert status == 2 and error == "error: --arm=base: belongs to one --study\n"


def test_a_dry_run_of_several_prints_what_each_and_all_cost(tmp_path):
    status, out, error = run(
        "--study=control,granularity", f"--workdir={tmp_path}", "--scale=smoke", "--dry_run"
    )
    assert status == 0, error
    assert "study control (smoke)" in out and "top16_of_128" in out
    assert "2 studies, runs in common made once: altogether about " in out and not list(
        tmp_path.iterdir()
    )
    (tmp_path / "summary.json").write_text("[]")  # so the single study has a folder in there
    status, out, error = run("--study=control", f"--workdir={tmp_path}", "--scale=smoke",
                             "--dry_run")  # fmt: skip
    assert status == 0 and "1 study, runs in common made once: altogether about " in out, error


def test_the_command_of_a_study_that_was_not_run_has_the_others_flags(tmp_path, monkeypatch):
    given = {"_SCALE": "smoke", "_DATA": "my data", "_SEEDS": ["4", "5"]}
    for name, value in given.items():
        monkeypatch.setattr(run_study, name, types.SimpleNamespace(value=value))
    written = []
    monkeypatch.setattr(run_study.app, "write_json", written.extend)
    run_study._summarize(summary, tmp_path)
    assert [row["study"] for row in written] == run_study.names()
    command = shlex.split(written[0]["command"])
    assert command[1:] == ["-m", "experiments.run_study", f"--study={written[0]['study']}",
                           f"--workdir={tmp_path}", "--scale=smoke", "--data=my data",
                           "--seeds=4,5"]  # fmt: skip
    assert "'--data=my data'" in (tmp_path / summary.TEXT).read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 / 0", "division by zero"),
        ("STUDY = 3", "must end with STUDY"),
        ("from experiments.studies.control import STUDY", "called 'control'; the name is the file"),
    ],
)
def test_a_file_that_declares_no_study_is_refused(tmp_path, text, message):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path}:.* .*{message}"):
        run_study.load(str(path))


def test_an_error_in_a_file_names_its_line_and_a_file_may_have_dataclasses(tmp_path, monkeypatch):
    text = "from __future__ import annotations\nimport dataclasses\n\n\n@dataclasses.dataclass\n"
    text += "class Width:\n    factor: int\n\n\n"
    path = tmp_path / "control.py"
    path.write_text(text + "Width(1) / 0\n")
    monkeypatch.chdir(tmp_path)
    for name in (str(path), "control.py"):
        with pytest.raises(ValueError, match=f"{path}:10: unsupported operand"):
            run_study.load(name)
    path.write_text(text + "from experiments.studies.control import STUDY\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run_study.load("~/control.py").name == "control"
    with pytest.raises(FileNotFoundError, match="--study=~/mine.py: no such file"):
        run_study.load("~/mine.py")


def test_the_slurm_script_starts_each_run_once(tmp_path):
    """With a python that only notes its arguments."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/calls\n')
    python.chmod(0o755)
    for task in range(6):
        environment = os.environ | {
            "SLURM_ARRAY_TASK_ID": str(task), "PATH": f"{tmp_path}:{os.environ['PATH']}",
        }  # fmt: skip
        script = ROOT / "experiments/studies/slurm_array.sh"
        arguments = [
            str(script),
            "moe_vs_dense",
            "W",
            "laptop",
            "dense moe",
            "1 2 3",
            "--data=my D",
        ]
        subprocess.run(["bash", *arguments], env=environment, check=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    ends = sorted(" ".join(call.split()[-2:]) for call in calls)
    assert ends == [f"--arm={arm} --seed={seed}" for arm in ("dense", "moe") for seed in (1, 2, 3)]
    common = "-m experiments.run_study --study=moe_vs_dense --workdir=W --scale=laptop "
    common += "--seeds=1,2,3 --data=my D --arm="
    assert all(call.startswith(common) for call in calls)


def test_a_pilot_refuses_what_it_would_not_follow_and_to_come_too_late(tmp_path):
    flags = ["--study=control", f"--workdir={tmp_path}", "--scale=smoke", "--pilot"]
    for extra in ("--arm=base", "--seed=1", "--seeds=7,8", "--protocol=p.json"):
        status, _, error = run(*flags, extra)
        assert status == 2 and error.count("\n") == 1
        assert f"--pilot {extra}: a pilot makes all its runs" in error
    status, out, error = run(*flags, "--dry_run")
    assert status == 0 and "pilot of control (smoke): 14 runs, seeds 101, 102" in out, error
    assert not list(tmp_path.iterdir())
    (tmp_path / "base/seed_1").mkdir(parents=True)
    (tmp_path / "base/seed_1/metrics.jsonl").write_text("")
    (tmp_path / "protocol.json").write_text("{}")
    status, _, error = run(*flags)
    assert status == 2 and "holds runs of the verdict already" in error
    assert (tmp_path / "protocol.json").read_text() == "{}"


def test_a_wrong_arm_is_all_that_is_said(tmp_path):
    flags = ["--study=control", f"--workdir={tmp_path}", "--scale=smoke", "--arm=wrose"]
    status, out, error = run(*flags)
    assert (status, out) == (2, "") and "no arm 'wrose' (the nearest is 'worse')" in error


def test_one_of_several_studies_follows_its_own_protocol(tmp_path):
    (tmp_path / "control").mkdir()
    (tmp_path / "control/protocol.json").write_text("{}")
    status, _, error = run(
        "--study=control", f"--workdir={tmp_path}", "--scale=smoke", "--dry_run"
    )  # fmt: skip
    assert status == 2 and f"{tmp_path}/control/protocol.json" in error


STUDY = """
import json
from olmoe_jax import config, studies

BASE = config.from_saved(json.loads({base!r}))
STUDY = studies.Study(
    name="mine", question="Does a larger eps hurt?", base={{"smoke": BASE}}, seeds=(1, 2),
    pilot_seeds=(7, 8), learning_rate_factors=(2.0,),
    arms=(studies.Arm(name="small"), studies.Arm(name="large", changes={{"optimizer.eps": 1e-2}})),
    outcomes=(studies.Outcome(arm="large", against="small", expected="higher", paper="it does"),),
)
"""


@pytest.mark.slow
def test_a_strangers_study_is_run_as_jobs_and_judged(tmp_path):
    """One file outside the checkout, no other change: two jobs, then the command without them."""
    corpus = tmp_path / "corpus.jsonl"
    lines = [{"id": str(i), "text": f"{i} and {i + 1} " * 30, "source": "a"} for i in range(90)]
    corpus.write_text("\n".join(json.dumps(line) for line in lines))
    data = tmp_path / "prepared"
    preparation.prepare([str(corpus)], data, sequence_length=16, vocab_size=270,
                        validation_fraction=0.1, announce=lambda line: None)  # fmt: skip
    base = config.Config(
        model=config.ModelConfig(
            vocab_size=270, max_length=16, num_layers=1, d_model=8, num_heads=2, num_kv_heads=2,
            d_ff=3, num_experts=3, num_experts_per_token=2, expert_backend="dense",
        ),
        data=config.DataConfig(path=str(data), sequence_length=16, validation_windows=5),
        training=config.TrainingConfig(num_steps=6, batch_size=4),
        checkpoint=config.CheckpointConfig(interval=3),
    )  # fmt: skip
    study = tmp_path / "mine.py"
    study.write_text(STUDY.format(base=json.dumps(dataclasses.asdict(base))))
    workdir = tmp_path / "run"
    flags = [f"--study={study}", f"--workdir={workdir}", "--scale=smoke"]
    pilot = [f"--study={study}", f"--workdir={tmp_path}/pilot", "--scale=smoke"]
    status, out, error = run(*pilot, "--pilot")
    assert status == 0 and "commit it before the runs that decide" in out, error
    protocol = json.loads((tmp_path / "pilot/protocol.json").read_text())
    rates = {"small": 8e-4, "large": 8e-4}
    assert protocol["learning_rates"] == rates and len(protocol["seeds"]) >= 3
    status, out, error = run(*pilot, "--dry_run")
    assert status == 0 and f"seeds {protocol['seeds']}" in out, error
    status, out, error = run(*flags, "--arm=small")
    assert status == 0 and "2 runs are not done yet: large 1, large 2" in out, error
    status, out, error = run(*flags, f"--json={tmp_path}/out.json")
    assert status == 0 and "n = 2 seeds" in out, error
    content = json.loads((tmp_path / "out.json").read_text())
    assert content == json.loads((workdir / "report.json").read_text())
    assert (workdir / "report.html").stat().st_size > 1_000_000
    study.write_text(study.read_text().replace("1e-2", "1e-3"))
    status, _, error = run(*flags)
    assert status == 2 and error.count("\n") == 1
    assert "large/seed_1 was run with another configuration" in error
    assert "config.optimizer.eps: 0.01 != 0.001" in error
