"""`experiments.upcycle` as a person runs it, and the line that it prints next."""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest

from olmoe_jax import accounting, machine, presets
from olmoe_jax import config as config_lib
from olmoe_jax.benchmarking import processes
from olmoe_jax.checkpoints import manifest, streamed
from olmoe_jax.porting import sources
from tests.porting import foreign
from tests.upcycling import dense

ROOT = pathlib.Path(__file__).parents[2]
NUMBERS = ("--num_experts=8", "--num_experts_per_token=2")


def start(binary, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", f"experiments.{binary}", *arguments], cwd=ROOT, text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run(binary, *arguments):
    process = start(binary, *arguments)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def test_says_what_it_made_and_what_to_do_next(tmp_path):
    dense.write_run(tmp_path / "run", step=6)
    code, out, err = run(
        "upcycle", f"--input={tmp_path}/run", f"--output={tmp_path}/moe", *NUMBERS,
        "--method=normalized", "--granularity=2", "--shared_expert", "--seed=3",
        f"--json={tmp_path}/result.json",
    )  # fmt: skip
    assert code == 0, err
    assert "computes what the dense one does, exactly" in out
    assert "6 steps here; its data order goes on at step 6, behind 24 windows (312 tokens)" in out
    assert f"--config=experiments/configs/upcycled.py:{tmp_path}/moe" in out
    assert "--config.data.start_step=6" in out and "--config.model.d_ff=6" in out
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["position"]["windows"] == 24 and result["bytes"] > 0
    assert result["config"]["model"]["num_shared_experts"] == 2
    record = json.loads((tmp_path / "moe" / "config.json").read_text())["upcycled"]
    assert record["recipe"] == {
        "num_experts": 8, "num_experts_per_token": 2, "method": "normalized", "granularity": 2,
        "diversify": "none", "fraction": 0.5, "shared_expert": True, "moe_every": 1, "seed": 3,
    }  # fmt: skip


def test_mistakes_are_one_line_and_leave_nothing(tmp_path):
    dense.write_run(tmp_path / "run")
    line = [f"--input={tmp_path}/run", f"--output={tmp_path}/moe"]
    for arguments, message in (
        ([*line, *NUMBERS, "--granularity=8"], "num_experts_per_token is 2: must be a multiple"),
        ([*line, *NUMBERS, "--method=scale"], "method"),
    ):
        code, _, err = run("upcycle", *arguments)
        assert code == 2 and err.startswith("error: ") and message in err, err
        assert len(err.strip().splitlines()) == 1, err
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.slow  # starts three binaries
def test_the_line_that_is_printed_is_of_what_was_made(tmp_path):
    """Of a folder from elsewhere, whose data is not known."""
    model = dense.change(qk_norm=False, init_cutoff=None, vocab_size=300, max_length=64)
    hf = foreign.write_folder(tmp_path / "hf", model=model, dtype="float32", numbers=True)
    line = f"--input={hf}", f"--output={tmp_path}/moe", *NUMBERS, "--method=normalized"
    code, out, err = run("upcycle", *line)
    assert code == 0, err
    assert "what the dense model has seen is not known" in out
    found = re.search(r"-m experiments.train (--config=\S+) --workdir=DIR", out)[1]
    code, out, err = run("train", *shlex.split(found), f"--workdir={tmp_path}/run", "--dry_run")
    assert code == 0, err + out
    ffn = 3 * model.d_model * model.d_ff + model.d_model
    count = accounting.num_params(model).total + model.num_layers * (7 * ffn + model.d_model)
    assert f"{count:,}" in out
    code, _, err = run("train", "--config=experiments/configs/upcycled.py", "--workdir=run")
    assert code == 2 and "upcycled.py:DIR" in err and len(err.strip().splitlines()) == 1


@pytest.mark.slow  # writes 16 GB
def test_full_size_streams_in_little_memory(tmp_path):
    """OLMo-1B-0724's shapes, random bits, in bfloat16 → 8 × 8192 top-2."""
    if (machine.free_disk(tmp_path) or 0) < 20e9:
        pytest.skip("needs 20 GB of disk")
    run_config = config_lib.Config(model=presets.get("olmo-1b-0724"))
    leaves = {
        name: (leaf.shape, "bfloat16")
        for name, leaf in sources.stored_leaves(run_config.model).items()
    }
    rng, source = np.random.default_rng(0), tmp_path / "dense"
    noise = (0.02 * rng.standard_normal(1 << 22, np.float32)).astype("bfloat16")
    with streamed.StreamedWriter(
        source, leaves, config_json=json.dumps({"config": _values(run_config), "step": None}),
        files={}, job={},
    ) as writer:  # fmt: skip
        for name, first, stop in writer.pending():
            shape = (stop - first, *leaves[name][0][1:])
            writer.write(name, first, np.resize(np.roll(noise, first), shape))
        writer.finish()
    process = start("upcycle", f"--input={source}", f"--output={tmp_path}/moe", *NUMBERS)
    with processes.PeakMemory(process.pid) as memory:
        out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    print(out, f"{memory.peak / 1e6:.0f} MB of anonymous memory")
    assert "6,917,193,728 parameters, 2,085,355,520 active" in out
    assert memory.peak < 3e9
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "moe"]
    written = manifest.read(streamed.StreamedReader(tmp_path / "moe").path)
    assert sum(leaf.nbytes for leaf in written.values()) == 2 * 6_917_193_728
    for folder in (source, tmp_path / "moe"):
        shutil.rmtree(folder)  # at once: pytest keeps what the last runs left


def _values(run_config):
    return json.loads(config_lib.to_json(run_config))
