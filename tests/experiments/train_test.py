"""`experiments.train` and `experiments.demo` as a person runs them: stopped, resumed, run again."""

import dataclasses
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

from olmoe_jax import config
from olmoe_jax.data import preparation

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def experiment(tmp_path):
    """An experiment file of a tiny run on a tiny corpus; its --config and the corpus's."""
    corpus = tmp_path / "corpus.jsonl"
    lines = [
        {"id": str(i), "text": f"{i} and {i + 1} " * 30, "source": "abc"[i % 3]} for i in range(90)
    ]
    corpus.write_text("\n".join(json.dumps(line) for line in lines))
    data = tmp_path / "prepared"
    preparation.prepare(
        [str(corpus)], data, sequence_length=16, vocab_size=270, validation_fraction=0.1,
        announce=lambda line: None,
    )  # fmt: skip
    run = config.Config(
        model=config.ModelConfig(
            vocab_size=270, max_length=16, num_layers=2, d_model=8, num_heads=2, num_kv_heads=2,
            d_ff=3, num_experts=3, num_experts_per_token=2,
        ),
        data=config.DataConfig(path=str(data), sequence_length=16, validation_windows=5),
        training=config.TrainingConfig(num_steps=400, batch_size=4),
        checkpoint=config.CheckpointConfig(interval=10),
    )  # fmt: skip
    path = tmp_path / "experiment.py"
    path.write_text(
        "import json\nfrom olmoe_jax import config\n"
        f"VALUES = json.loads({json.dumps(dataclasses.asdict(run))!r})\n"
        "def get_config():\n    return config.to_flags(config.from_saved(VALUES))\n"
    )
    return path


def start(*arguments, cwd=ROOT):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", *arguments], cwd=cwd, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def test_ctrl_c_saves_and_the_printed_line_resumes(tmp_path, experiment):
    """With a workdir relative to the folder, as people type it."""
    process = start("experiments.train", f"--config={experiment}", "--workdir=run", cwd=tmp_path)
    deadline = time.monotonic() + 120
    while (
        not list(tmp_path.glob("run/checkpoints/step10-tokens*K")) and time.monotonic() < deadline
    ):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGINT, output
    line = re.search(r"To resume:\n\s+(.*)", output)[1]
    again = start(*shlex.split(line)[2:], "--config.training.num_steps=430", cwd=tmp_path)
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0, output
    assert re.search(r"resumed at step \d+", output)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").open()]
    assert steps == list(range(431))


@pytest.mark.slow
def test_the_demo_judges_and_does_not_redo_what_is_done(tmp_path, experiment):
    arguments = ["experiments.demo", f"--config={experiment}", "--workdir=run"]
    process = start(*arguments, cwd=tmp_path)
    first, _ = process.communicate(timeout=240)
    assert process.returncode in (0, 1), first  # so small a model may fail the demo's checks
    assert "below a unigram model" in first and "shuffling the context" in first
    written = {p: p.stat().st_mtime_ns for p in tmp_path.glob("run/**/*") if p.is_file()}
    assert tmp_path / "run/training.png" in written
    process = start(*arguments, cwd=tmp_path)
    second, _ = process.communicate(timeout=120)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("run/**/*") if p.is_file()} == written
    verdict = "validation after"
    assert second[second.index(verdict) :] == first[first.index(verdict) :]


@pytest.mark.slow
def test_the_demo_judges_a_dense_model_too(tmp_path, experiment):
    process = start(
        "experiments.demo", f"--config={experiment}", "--workdir=dense",
        "--config.model.num_experts=0", "--config.training.num_steps=20", cwd=tmp_path,
    )  # fmt: skip
    output, _ = process.communicate(timeout=240)
    assert process.returncode in (0, 1) and "where everything is" in output, output
