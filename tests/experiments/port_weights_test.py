"""`experiments.port_weights` as a person runs it."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time

from olmoe_jax.porting import port
from tests.porting import foreign

ROOT = pathlib.Path(__file__).parents[2]


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.port_weights", *arguments], cwd=ROOT, text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run(*arguments):
    process = start(*arguments)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def test_ports_verifies_and_says_what_to_do_next(tmp_path):
    source = foreign.write_folder(tmp_path / "in", numbers=True)
    code, out, err = run(
        f"--input={source}", f"--output={tmp_path}/out", "--to=orbax", "--verify",
        f"--json={tmp_path}/result.json",
    )  # fmt: skip
    assert code == 0, err
    assert "verified: " in out and "layers/00/attention/key" in out
    assert f'olmoe_jax.load("{tmp_path}/out")' in out and "experiments.generate" in out
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["results"][0]["tensors"] > 10 and result["claims"]


def test_mistakes_are_one_line(tmp_path):
    source = foreign.write_folder(tmp_path / "in")
    (source / "model-00002-of-00003.safetensors").unlink()
    for arguments, message in (
        (["--to=orbax", f"--output={tmp_path}/out"], "--input is required"),
        (["--to=orbax", f"--output={tmp_path}/out", f"--input={source}"], "model-00002-of-00003"),
        (["--to=orbax", f"--output={source}", f"--input={source}"], "is there already"),
        (["--to=gguf", f"--output={tmp_path}/out", f"--input={source}"], "gguf"),
    ):
        code, _, err = run(*arguments)
        assert code == 2 and err.startswith("error: ") and message in err, err
        assert len(err.strip().splitlines()) == 1, err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_killed_it_goes_on_with_what_it_has(tmp_path):
    model = dataclasses.replace(foreign.MODEL, num_layers=40, d_model=64, d_ff=64)
    source = foreign.write_folder(tmp_path / "in", model=model)
    line = [f"--input={source}", f"--output={tmp_path}/out", "--to=orbax"]
    process = start(*line)
    journal = tmp_path / "out.partial" / "journal.jsonl"
    while process.poll() is None and not (journal.exists() and journal.stat().st_size > 4000):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (tmp_path / "out").exists()
    code, out, err = run(*line)
    assert code == 0, err
    assert " kept)" in out
    port.port(tmp_path / "out", tmp_path / "back", to="huggingface", announce=print)
    assert foreign.contents(tmp_path / "back") == foreign.contents(source)
