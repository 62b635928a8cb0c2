import json
import pathlib
import subprocess
import sys

import pytest

from olmoe_jax.data import pipeline
from olmoe_jax.data import tokenizer as tokenizer_lib

ROOT = pathlib.Path(__file__).parents[2]
TEXTS = [f"document {n} says {n * 7919 % 1009} things about {n % 31} others" for n in range(97)]


def _run(*arguments):
    command = [sys.executable, "-m", "experiments.prepare_data", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def corpus(tmp_path):
    """Two files of records and a bad line, and a tokenizer."""
    lines = [
        json.dumps({"id": str(n), "text": t, "source": "ab"[n % 2]}) for n, t in enumerate(TEXTS)
    ]
    (tmp_path / "one.jsonl").write_text("\n".join(lines[:50]))
    (tmp_path / "two.jsonl").write_text("\n".join([*lines[50:], '{"id": 3']))
    tokenizer = tokenizer_lib.train(TEXTS, vocab_size=307)
    (tmp_path / "bpe.json").write_bytes(tokenizer.json)
    return tmp_path


def test_it_prepares_reports_and_writes_json(corpus):
    done = _run(
        f"--input={corpus}/one.jsonl,{corpus}/two.jsonl", f"--tokenizer={corpus}/bpe.json",
        f"--output={corpus}/out", "--sequence_length=17", "--on_error=skip", "--workers=0",
        f"--json={corpus}/result.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((corpus / "result.json").read_text())
    assert result["skipped_records"] == 1 and result["info"]["num_documents"] == len(TEXTS)
    assert pipeline.open(corpus / "out").info.domains == ("a", "b")
    for words in (
        "reading",
        "expected time",
        "two.jsonl, line 48",
        "97 documents",
        "skipped 1 bad",
    ):
        assert words in done.stdout


ERRORS = {
    "bad line": (["--input={0}/*.jsonl"], "two.jsonl, line 48: not a JSON object"),
    "no file": (["--input={0}/three.jsonl"], "no file matches"),
    "no input": ([], "--input is required"),
    "not a tokenizer": (["--input={0}/one.jsonl", "--tokenizer={0}/two.jsonl"], "not a tokenizer"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_a_mistake_is_one_line_and_exit_status_2(corpus, case):
    arguments, message = ERRORS[case]
    arguments = [a.format(corpus) for a in arguments]
    done = _run(*arguments, f"--output={corpus}/out", "--sequence_length=17")
    assert done.returncode == 2
    (line,) = [x for x in done.stderr.splitlines() if not x.startswith("tokenising")]
    assert line.startswith("error: ") and message in line
    assert not (corpus / "out").exists()
