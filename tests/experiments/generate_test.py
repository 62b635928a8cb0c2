import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from olmoe_jax import checkpoints, config, generation, loading
from olmoe_jax.data import tokenizer as tokenizer_lib
from olmoe_jax.model import transformer

ROOT = pathlib.Path(__file__).parents[2]
PROMPT = "the third document"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A workdir `run` with one checkpoint, its data's tokenizer in `data`, the same checkpoint
    alone in `alone`, and in `damaged` with an array that is not what its hash says."""
    folder = tmp_path_factory.mktemp("generate")
    texts = [f"document {n} says {n * 7919 % 1009} things of the third" for n in range(97)]
    tokenizer = tokenizer_lib.train(texts, vocab_size=281)
    (folder / "data").mkdir()
    (folder / "data" / "tokenizer.json").write_bytes(tokenizer.json)
    run = config.Config(
        model=config.ModelConfig(
            vocab_size=281, num_layers=2, d_model=12, num_heads=3, num_kv_heads=3, d_ff=5,
            num_experts=3, num_experts_per_token=2, max_length=40, init_std=0.4,
        ),
        data=config.DataConfig(sequence_length=16),
        training=config.TrainingConfig(batch_size=4),
        losses=config.LossesConfig(load_balancing_group=4),
    )  # fmt: skip
    init = jax.jit(transformer.Transformer(run.model).init)
    with checkpoints.Checkpoints(folder / "run", run) as kept:
        kept.save_params(2, init(jax.random.key(2), jnp.zeros((1, 3), jnp.int32))["params"])
    content = {"config": dataclasses.asdict(run), "data_path": str(folder / "data")}
    (folder / "run" / "config.json").write_text(json.dumps(content))
    name = checkpoints.list_checkpoints(folder / "run")[0][1].name
    shutil.copytree(folder / "run" / "checkpoints" / name, folder / "alone" / name)
    shutil.copytree(folder / "alone", folder / "damaged")
    manifest = folder / "damaged" / name / "manifest" / "process_0.json"
    content = json.loads(manifest.read_text())
    content["leaves"]["embedding"]["pieces"][0]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(content))
    return folder


def _run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "experiments.generate", *arguments], cwd=ROOT, text=True,
        capture_output=True, env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip


def test_it_prints_the_prompt_and_what_follows(folder):
    done = _run(
        f"--model={folder}/run", f"--prompt={PROMPT}", "--num_tokens=7",
        f"--json={folder}/result.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / "result.json").read_text())
    tokenizer = generation.find_tokenizer(folder / "run")
    model, params = loading.load(folder / "run")
    assert result["prompt_ids"] == tokenizer.encode_batch([PROMPT])[0].tolist()
    assert result["ids"] == generation.greedy(
        model, params, result["prompt_ids"], num_tokens=7, end_token=tokenizer.end_of_document
    )
    assert result["text"] == tokenizer.decode(result["ids"])
    assert done.stdout == f"{PROMPT}{result['text']}\n"


ERRORS = {
    "no model": (["--prompt=a"], "--model is required"),
    "no prompt": (["--model={0}/run"], "--prompt is required"),
    "no such model": (["--model={0}/typo", "--prompt=a"], "typo: no such directory; expected"),
    "no tokenizer": (["--model={0}/alone/{1}", "--prompt=a"], "pass --tokenizer=FILE"),
    "damaged weights": (
        ["--model={0}/damaged/{1}", "--tokenizer={0}/data", "--prompt=a"],
        "arrays damaged (embedding)",
    ),
    "too long": (
        ["--model={0}/alone/{1}", "--tokenizer={0}/data", "--prompt=a b c d e f g h"],
        "tokens and 32 are to be added: the model's max_length is 40",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_a_mistake_is_one_line_and_exit_status_2(folder, case):
    arguments, message = ERRORS[case]
    name = next((folder / "alone").iterdir()).name
    done = _run(*(a.format(folder, name) for a in arguments))
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and message in line
