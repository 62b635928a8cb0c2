"""The binary: suites, flags, exit status."""

import dataclasses
import importlib
import json
import pathlib
import subprocess
import sys
import types

import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import benchmark
from olmoe_jax.benchmarking import options as options_lib

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def suite(monkeypatch):
    """A fake suite `port`: set its `answer`; it notes the `options` that it was given."""
    fake = types.SimpleNamespace(answer=({"suite": "port"}, True), options=None)

    def run(options):
        fake.options = options
        return fake.answer

    fake.run = run
    monkeypatch.setitem(sys.modules, "olmoe_jax.benchmarking.port", fake)
    monkeypatch.setattr(benchmark.app, "tune_allocator", lambda: True)
    monkeypatch.setattr(benchmark.app, "write_json", lambda result: setattr(fake, "json", result))
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(suite="port"):
        yield fake


@pytest.mark.parametrize("name", benchmark.SUITES)
def test_every_suite_exists_and_says_what_it_measures(name):
    module = importlib.import_module(f"olmoe_jax.benchmarking.{name}")
    assert callable(module.run) and module.__doc__.startswith(f"`{name}`: ")


def test_every_option_has_its_flag(suite):
    assert benchmark.main([]) == 0
    assert suite.options == options_lib.Options(allocator_tuned=True)  # the flags' defaults
    values = {"rounds": 5, "scratch": "there", "preset": "olmo-1b", "num_layers": 3, "shards": 2,
              "peer_python": "python", "dtype": "bfloat16", "expert_backend": "loop",
              "shape": "b2048"}  # fmt: skip
    with flagsaver.flagsaver(**values):
        benchmark.main([])
    assert dataclasses.asdict(suite.options) == values | {"allocator_tuned": True}


def test_wrong_results_are_written_and_fail(suite, tmp_path):
    suite.answer = ({"suite": "port", "ratio_x": 1.5}, False)
    with flagsaver.flagsaver(plot=str(tmp_path / "picture.png")):
        assert benchmark.main([]) == 1
    assert suite.json == {"suite": "port", "ratio_x": 1.5}
    assert (tmp_path / "picture.png").exists()


def test_rounds_must_be_positive(suite):
    with flagsaver.flagsaver(rounds=0), pytest.raises(ValueError, match="--rounds=0: must be"):
        benchmark.main([])
    assert suite.options is None


def test_a_mistake_is_one_line():
    command = [sys.executable, "-m", "experiments.benchmark", "--suite=ports"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and "matmul_peak" in done.stderr


def test_a_suite_runs_from_the_command_line(tmp_path):
    code = (
        "import sys; from olmoe_jax.benchmarking import matmul_peak as m; from experiments import "
        "app, benchmark; m.SIZE, m.SECONDS = 31, 0.01; "
        "app.run(benchmark.main, flags_with_json=True)"
    )
    line = ["--suite=matmul_peak", "--rounds=1", f"--json={tmp_path / 'result.json'}"]
    done = subprocess.run(
        [sys.executable, "-c", code, *line], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["suite"] == "matmul_peak"
    assert result["contestants"]["ours float32"]["seconds"].keys() == {"median", "low", "high"}
    assert "ours bfloat16" in done.stdout and "no peer" in done.stdout
