"""`experiments.analyze_routing` as a person runs it."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from olmoe_jax.data import tokenizer as tokenizer_lib
from tests.analysis import models
from tests.porting import foreign

ROOT = pathlib.Path(__file__).parents[2]
VOCAB = 300  # the 256 bytes and some


def run(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.analyze_routing", *arguments], cwd=ROOT, text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, timeout=300,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """Two checkpoints of one model, and texts of two domains."""
    folder = tmp_path_factory.mktemp("suite")
    for number in (1, 2):
        models.folder(folder / "olmoe" / f"step{number}-tokens{number}K", vocab_size=VOCAB)
    words = tokenizer_lib.train(["the word is long def return"], vocab_size=VOCAB)
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_bytes(words.json)
    for name, words in (("code", "def return yield "), ("prose", "the word is long ")):
        paragraphs = "\n\n".join(words * n for n in range(3, 23))
        (folder / f"{name}.txt").write_text(paragraphs)
    return folder, tokenizer


def test_one_command_records_analyses_and_reports(suite, tmp_path):
    folder, tokenizer = suite
    arguments = (
        f"--model={folder}/olmoe", f"--data={folder}/*.txt", f"--tokenizer={tokenizer}",
        f"--output={tmp_path}/out", "--context_length=11", f"--json={tmp_path}/summary.json",
        "--prompt=the word", "--prompt=def return",
        "--export=npz",
    )  # fmt: skip
    code, out, err = run(*arguments, "--interventions=1", "--intervention_tokens=60")
    assert code == 0, err
    assert "recording olmoe step2-tokens2K" in out and f"page: {tmp_path}/out/report.html" in out
    output = tmp_path / "out"
    content = json.loads((output / "domain_specialisation.json").read_text())
    shares = next(iter(content.values()))["code"]["topk"]
    assert len(shares) == foreign.MODEL.num_experts
    assert sum(shares) == pytest.approx(foreign.MODEL.num_experts_per_token, abs=1e-3)
    # Both checkpoints are the same model, so the router is what it is at the end.
    saturation = json.loads((output / "router_saturation.json").read_text())
    assert saturation["checkpoints"][0]["against_final"]["mean"]["topk"]["value"] == 1.0
    assert (output / "traces" / "olmoe" / "step1-tokens1K" / "prose").is_dir()
    page = (output / "report.html").read_text()
    assert "The last checkpoint is step2-tokens2K" in page and len(page) < 10e6
    assert "what the router sees in “def return”" in page
    texts = json.loads((output / "prompt.json").read_text())["prompts"]
    assert ["".join(t["text"] for t in one["tokens"]) for one in texts] == [
        "the word", "def return"
    ]  # fmt: skip
    pictures = {path.name for path in (output / "figures").iterdir()}
    assert {f"olmoe_router_saturation_over_layers.{e}" for e in ("png", "svg", "csv")} <= pictures
    assert "interventions: " in out and "runs of 120 tokens" in out
    assert "=1 in each of 2 domains: too few experts" in out and "=3 would do" in out
    assert "note: one document in code, prose: effects" in out
    assert "not to be told from chance, as a domain has one document" in out
    effects = json.loads((output / "interventions.json").read_text())
    assert effects["weights_renormalised"] is False and effects["domains"]["code"]["tokens"] < 60
    siblings = json.loads((output / "expert_siblings.json").read_text())["checkpoints"]
    assert [one["name"] for one in siblings] == ["step1-tokens1K", "step2-tokens2K"]
    exported = f"{output}/export/olmoe/*/*.npz"
    code, again, err = run(f"--traces={exported}", f"--output={tmp_path}/two", "--nodebug")
    assert code == 0, err
    for name in ("router_saturation", "coactivation"):  # the same numbers from these files
        one, two = ((tmp_path / d / f"{name}.json").read_text() for d in ("out", "two"))
        assert json.loads(one) == json.loads(two)
    code, again, err = run(*arguments, "--output_format=none", "--interventions=0")
    assert code == 0, err
    # nothing of the first run is left beside the second's summary
    assert not list((output / "figures").iterdir()) and not (output / "report.html").exists()
    assert not (output / "interventions.json").exists() and (output / "prompt.json").exists()
    assert json.loads((tmp_path / "summary.json").read_text())["models"]["olmoe"]["sentences"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "give --model with --data, or --routing_dump"),
        (("--traces=/nowhere/*.npy",), "/nowhere/*.npy: no file matches"),
        (("--traces=x", "--interventions=1"), "no effect with --traces: it needs --model"),
        (("--model=HERE", "--num_experts=3"), "no effect with --model: it needs --traces"),
        (("--routing_dump=x", "--nokeep_traces"), "--keep_traces has no effect"),
        (("--routing_dump=x", "--total_steps=9"), "has one checkpoint"),
        (("--model=HERE", "--data=x.txt", "--split=train"), "needs prepared --data"),
        (("--model=HERE", "--intervention_tokens=9"), "no effect without --interventions"),
        (("--model=HERE", "--interventions=1", "--intervention_tokens=1"), "must be 2 or more"),
        (("--model=HERE", "--export=csv", "--nokeep_traces"), "that --nokeep_traces deletes"),
        (("--model=HERE", "--tokenizer=gpt=t.json"), "--tokenizer=gpt=…: no such model; there are"),
        (("--routing_dump=x", "--export=csv"), "which has no traces"),
        (("--routing_dump=x", "--data=x"), "--data has no effect with --routing_dump"),
        (("--routing_dump=x", "--prompt=x"), "it needs --model"),
        (("--model=/nowhere", "--data=x"), "/nowhere"),
        (("--model=HERE",), "is no run, whose data could be read: give --data"),
        (("--routing_dump=/nowhere",), "/nowhere"),
    ],
)
def test_bad_input_is_one_line(arguments, message, suite, tmp_path):
    here = f"{suite[0]}/olmoe/step1-tokens1K"
    arguments = [a.replace("HERE", here) for a in arguments]
    code, _, err = run(f"--output={tmp_path}/o", *arguments)
    assert code == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "o").exists()
