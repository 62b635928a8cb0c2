"""`experiments.compare_upcycling` as a person runs it, and the declaration of its runs."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from experiments.studies import upcycling
from olmoe_jax import studies
from olmoe_jax.data import preparation
from olmoe_jax.studies import equality, plans
from olmoe_jax.upcycling import recipe as recipe_lib

ROOT = pathlib.Path(__file__).parents[2]


def run(*arguments):
    """(exit status, stdout, stderr) of `python -m experiments.compare_upcycling …`."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(
        [str(ROOT), os.environ.get("PYTHONPATH", "")])}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "experiments.compare_upcycling", *arguments], cwd=ROOT,
        env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("method", recipe_lib.METHODS)
@pytest.mark.parametrize("scale", list(upcycling.BASES))
def test_both_moe_arms_have_the_upcycled_models_shape_and_read_the_same_windows(scale, method):
    study = upcycling.declare(num_experts=6, num_experts_per_token=3, method=method)
    configs = study.configs(scale)
    dense, upcycled, scratch = (configs[name] for name in ("dense", "upcycled", "scratch"))
    recipe = recipe_lib.Recipe(num_experts=6, num_experts_per_token=3, method=method)
    assert upcycled.model == recipe_lib.moe_config(dense.model, recipe)
    assert upcycled == scratch and upcycled.optimizer == dense.optimizer
    assert upcycled.data.start_step == dense.training.num_steps
    assert dataclasses.replace(upcycled.data, start_step=0) == dense.data
    assert upcycled.optimizer.schedule == "constant"


def test_the_papers_scale_has_the_papers_sizes():
    dense, _, scratch = upcycling.STUDY.configs("paper").values()
    assert equality.cost(dense).tokens == pytest.approx(2e12, rel=0.01)
    assert equality.cost(scratch).tokens == pytest.approx(610e9, rel=0.001)
    assert equality.cost(scratch).total == pytest.approx(6.92e9, rel=0.01)
    assert equality.cost(scratch).active == pytest.approx(2.09e9, rel=0.01)


def test_a_workdir_holds_one_way_of_upcycling(tmp_path):
    plans.write_marker(plans.make_plan(upcycling.declare(), tmp_path, scale="smoke"))
    other = upcycling.declare(method="scaled")
    with pytest.raises(ValueError, match="variant 'method=reference', not 'method=scaled'"):
        plans.make_plan(other, tmp_path, scale="smoke")
    plans.make_plan(upcycling.declare(), tmp_path, scale="smoke")


def test_an_arm_starts_from_one_thing():
    both = studies.Arm(name="upcycled", starts_from="scratch", start="dir")
    arms = (studies.Arm(name="scratch"), both)
    with pytest.raises(ValueError, match="start is 'dir': arm upcycled starts from scratch alrea"):
        dataclasses.replace(upcycling.STUDY, arms=arms)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dense_tokens=5"], "--dense_tokens=5: the tokens of --dense_checkpoint"),
        (["--num_experts=8", "--num_experts_per_token=9"], "num_experts_per_token is 9"),
    ],
)
def test_flags_that_contradict_each_other_are_one_line(tmp_path, flags, message):
    status, _, error = run(f"--workdir={tmp_path}/w", "--scale=smoke", *flags)
    assert status == 2 and error.count("\n") == 1 and message in error
    assert not (tmp_path / "w").exists()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Prepared data of two domains, windows of 32 tokens; and the same text otherwise tokenised."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = [{"id": str(i), "text": f"{i} and {i + 1} " * 40, "source": "ab"[i % 2]}
             for i in range(300)]  # fmt: skip
    (folder / "corpus.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    for name, size in (("data", 290), ("other", 280)):
        preparation.prepare(
            [str(folder / "corpus.jsonl")], folder / name, sequence_length=32, vocab_size=size,
            validation_fraction=0.1, announce=lambda line: None,
        )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def compared(prepared, tmp_path_factory):
    """(workdir, flags, what the command printed) of two seeds at the smallest scale."""
    workdir = tmp_path_factory.mktemp("compare") / "w"
    flags = [f"--workdir={workdir}", "--scale=smoke", f"--data={prepared}/data", "--seeds=1,2",
             "--num_experts=4"]  # fmt: skip
    status, out, error = run(*flags, f"--json={workdir}.json")
    assert status == 0, error
    return workdir, flags, out


def _losses(workdir, arm, seed):
    text = (workdir / arm / f"seed_{seed}" / "metrics.jsonl").read_text()
    records = [json.loads(line) for line in text.splitlines()]
    return {r["step"]: r["validation/loss"] for r in records if "validation/loss" in r}


@pytest.mark.slow
def test_one_command_trains_compares_draws_and_does_no_work_twice(compared):
    workdir, flags, out = compared
    assert out.index("(an estimate)") < out.index("dense, seed 1")
    content = json.loads((workdir / "compare.json").read_text())
    assert content == json.loads(pathlib.Path(f"{workdir}.json").read_text())
    for line in content["words"]:
        assert line in out
    for seed in (1, 2):
        up, scratch = (_losses(workdir, arm, seed) for arm in ("upcycled", "scratch"))
        curve = content["curves"]["upcycled"][str(seed)]
        assert dict(zip(curve["step"], curve["validation/loss"], strict=True)) == up
        gap = content["lead"]["end"]["each"][str(seed)]
        assert gap == pytest.approx(scratch[20] - up[20])
        # the upcycled run begins near where the dense one ended, scratch at the logarithm of 290
        assert abs(up[0] - _losses(workdir, "dense", seed)[4]) < 0.05
        np.testing.assert_allclose(scratch[0], np.log(290), atol=0.1)
    assert (workdir / "compare.png").is_file() and (workdir / "report.html").is_file()
    times = {p: p.stat().st_mtime_ns for p in workdir.rglob("metrics.jsonl")}
    (workdir / "compare.json").unlink()
    status, again, error = run(*flags)
    assert status == 0 and "6 runs, 6 done" in again, error
    assert json.loads((workdir / "compare.json").read_text()) == content
    assert {p: p.stat().st_mtime_ns for p in workdir.rglob("metrics.jsonl")} == times


@pytest.mark.slow
def test_a_workdir_of_other_runs_is_refused(compared):
    workdir, flags, _ = compared
    status, _, error = run(*flags, "--num_experts=6")
    assert status == 2 and error.count("\n") == 1
    assert "config.model.num_experts: 4 != 6" in error
    status, _, error = run(f"--workdir={workdir}/dense/seed_1", "--scale=smoke")
    assert status == 2 and "is the workdir of a training run" in error


@pytest.mark.slow
def test_a_dense_model_that_is_there_brings_its_data_and_its_budget(compared, prepared, tmp_path):
    workdir, _, _ = compared
    dense = upcycling.open_dense(workdir / "dense/seed_1", "smoke", None, None)
    assert (dense.start_step, dense.tokens) == (4, 4 * 8 * 32)
    assert dense.base.data.path == str(prepared / "data") and "order of seed 1" in dense.notes[0]
    with pytest.raises(ValueError, match="a Mixture of Experts .num_experts=4.; name a dense"):
        upcycling.open_dense(workdir / "scratch/seed_1", "smoke", None, None)
    with pytest.raises(ValueError, match="other: has another tokenizer than"):
        upcycling.open_dense(workdir / "dense/seed_1", "smoke", prepared / "other", None)
    with pytest.raises(ValueError, match="dense_tokens=7: .* says that it was trained on 1024"):
        upcycling.open_dense(workdir / "dense/seed_1", "smoke", None, 7)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        upcycling.open_dense(tmp_path / "nowhere", "smoke", None, None)
    status, out, error = run(
        f"--workdir={tmp_path}/w", "--scale=smoke", "--seeds=1", "--num_experts=4",
        f"--dense_checkpoint={workdir}/dense/seed_1",
    )  # fmt: skip
    assert status == 0 and "One seed gives no interval" in out, error
    content = json.loads((tmp_path / "w/compare.json").read_text())
    # the same seed, data and place: the same runs as those that trained the dense model first
    assert _losses(tmp_path / "w", "upcycled", 1) == _losses(workdir, "upcycled", 1)
    assert content["dense"]["1"]["tokens"] == 1024 and content["dense"]["1"]["seconds"] is None
    whole = json.loads((workdir / "compare.json").read_text())
    assert content["dense"]["1"]["flops"] == whole["dense"]["1"]["flops"]
