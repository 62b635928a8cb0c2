import dataclasses
import json
import pathlib
import random
import subprocess
import sys

import numpy as np
import pytest

from olmoe_jax import config as config_lib
from olmoe_jax.data import pipeline, preparation, provenance

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(workdir, data, config) of a run that has not trained yet."""
    directory = tmp_path_factory.mktemp("run")
    rng = random.Random(3)
    with open(directory / "corpus.jsonl", "w") as file:
        for n in range(71):
            text = " ".join(rng.choices(["alpha", "beta", "gamma", "delta"], k=rng.randint(2, 60)))
            file.write(json.dumps({"id": f"doc-{n}", "text": text, "source": f"s{n % 3}"}) + "\n")
    preparation.prepare(
        [str(directory / "corpus.jsonl")], directory / "data", sequence_length=19, vocab_size=263,
        validation_fraction=0.1, announce=lambda line: None,
    )  # fmt: skip
    config = config_lib.Config(
        data=config_lib.DataConfig(sequence_length=19, start_step=2),
        training=config_lib.TrainingConfig(batch_size=3, seed=5),
    )
    workdir = directory / "workdir"
    workdir.mkdir()
    content = {"config": dataclasses.asdict(config), "data_path": str(directory / "data")}
    (workdir / "config.json").write_text(json.dumps(content))
    return workdir, pipeline.open(directory / "data"), config


def _run(*arguments):
    command = [sys.executable, "-m", "experiments.inspect_batch", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_it_prints_the_documents_and_writes_the_arrays_that_training_sees(run, tmp_path):
    workdir, data, _ = run
    expected = pipeline.Batches(data, batch_size=3, seed=5, start_step=2).batch(13)
    done = _run(
        f"--workdir={workdir}", "--step=13", f"--tokens={tmp_path}/x/step.npz",
        f"--json={tmp_path}/step.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "x" / "step.npz") as arrays:
        assert set(arrays) == set(expected)
        assert all(np.array_equal(arrays[k], expected[k]) for k in expected)
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["step.npz"]
    for number in set(expected["documents"].ravel().tolist()) - {-1}:
        document = data.document(number)
        lines = [x for x in done.stdout.splitlines() if f"document {number} " in x]
        assert lines and all(document.id in x and document.source in x for x in lines)
        assert all(document.first_words in x for x in lines)
    rows = json.loads((tmp_path / "step.json").read_text())["rows"]
    assert len(rows) == 3
    for row, documents in zip(rows, expected["documents"], strict=True):
        covered = [n for s in row["documents"] for n in [s["number"]] * (s["end"] - s["start"])]
        assert covered == documents[documents >= 0].tolist()


def test_spans_leave_padding_out(run):
    _, data, _ = run
    found = provenance.spans(data, np.array([4, 4, 7, 9, 9, 9, -1, -1]))
    assert [(s.start, s.end, s.number) for s in found] == [(0, 2, 4), (2, 3, 7), (3, 6, 9)]
    assert provenance.spans(data, np.array([-1, -1])) == []


def test_mistakes_are_named(run, tmp_path):
    workdir, _, _ = run
    with pytest.raises(ValueError, match="step=-1"):
        provenance.step_contents(workdir, -1)
    with pytest.raises(
        FileNotFoundError, match="config.json: no such file; --workdir names no run"
    ):
        provenance.step_contents(tmp_path, 0)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="not the config.json of a run"):
        provenance.step_contents(tmp_path, 0)
    done = _run(f"--workdir={workdir}/nowhere", "--step=0")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
