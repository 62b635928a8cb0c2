import collections
import gzip
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from olmoe_jax.data import corpora, dataset, embedded, layout, pieces, pipeline, preparation
from olmoe_jax.data import tokenizer as tokenizer_lib

ROOT = pathlib.Path(__file__).parents[2]
REAL_DATA = ROOT.parent / "shared" / "data"


def _prepare(prepared, output, inputs=None, **arguments):
    arguments = {"validation_fraction": 0.1, "announce": lambda line: None} | arguments
    return preparation.prepare(
        inputs or [str(prepared.corpus)],
        output,
        sequence_length=23,
        tokenizer=str(prepared.tokenizer_file),
        **arguments,
    )


def _all_windows(data, split):
    return data.read_windows(split, range(data.num_windows(split)))


def _same_data(a, b):
    return all(
        np.array_equal(_all_windows(a, split)[name], _all_windows(b, split)[name])
        for split in layout.SPLITS
        for name in ("tokens", "documents", "domains")
    )


def test_windows_hold_every_document_whole_with_its_source(prepared):
    data, texts = prepared.data, collections.defaultdict(list)
    for split in layout.SPLITS:
        windows = _all_windows(data, split)
        for token, number, domain in zip(*(windows[k].ravel() for k in windows), strict=True):
            if number != layout.PADDING_DOCUMENT:
                texts[int(number)].append(int(token))
                assert data.document(number).domain == data.info.domains[domain]
                assert data.document(number).split == split
    assert sorted(texts) == list(range(len(prepared.records)))
    for number, record in enumerate(prepared.records):
        document = data.document(number)
        assert texts[number][-1] == data.info.end_of_document
        assert data.tokenizer.decode(texts[number][:-1]) == record["text"]
        assert (document.id, document.source) == (record["id"], record["source"])
        assert document.tokens == len(texts[number])
        assert document.text_bytes == len(record["text"].encode())
        words = " ".join(record["text"].split())
        assert words.startswith(document.first_words) and document.first_words
    assert len(texts[7]) > 4 * 23  # the document that spans several windows


def test_info_counts_what_the_windows_hold(prepared):
    data = prepared.data
    info = data.info
    assert info.domains == ("books", "code", "wiki")
    assert info.tokenizer_sha256 == prepared.tokenizer.sha256
    assert info.vocab_size == 307 and info.num_documents == 131 and info.skipped_records == 0
    assert sum(s.documents for s in info.splits.values()) == 131
    total = sum(s.text_bytes for s in info.splits.values())
    assert total == sum(len(r["text"].encode()) for r in prepared.records)
    for split, numbers in info.splits.items():
        windows = _all_windows(data, split)
        real = windows["documents"] != layout.PADDING_DOCUMENT
        assert real.sum() == numbers.tokens == sum(numbers.domain_tokens.values())
        assert numbers.text_bytes == data.token_bytes[windows["tokens"][real]].sum()
        for number, domain in enumerate(info.domains):
            here = real & (windows["domains"] == number)
            assert here.sum() == numbers.domain_tokens[domain] > 0
            counted = data.token_bytes[windows["tokens"][here]].sum()
            assert counted == numbers.domain_text_bytes[domain]
        if split == "train":
            counts = np.bincount(windows["tokens"][real], minlength=307)
            assert data.unigram_counts.tolist() == counts.tolist()


def test_nothing_but_the_result_is_left(prepared):
    assert not list(prepared.path.parent.glob("out.*"))
    names = {p.name for p in prepared.path.iterdir()}
    assert names == {*"info.json tokenizer.json dataset documents.jsonl".split()} | {
        "documents.offsets.bin", "unigram_counts.npy"
    }  # fmt: skip
    assert not list(prepared.path.rglob("*incomplete*"))


def test_workers_and_slices_do_not_change_the_result(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "READ_BYTES", 512)
    monkeypatch.setitem(corpora.slices.__kwdefaults__, "slice_bytes", 1024)
    result = _prepare(prepared, tmp_path / "out", workers=2)
    assert result.pieces_tokenised > 5
    assert _same_data(pipeline.open(tmp_path / "out"), prepared.data)


def test_a_rerun_after_a_kill_tokenises_nothing_twice(prepared, tmp_path, monkeypatch):
    monkeypatch.setitem(corpora.slices.__kwdefaults__, "slice_bytes", 1024)
    monkeypatch.setattr(corpora, "READ_BYTES", 512)
    tokenised = []
    tokenise = pieces.tokenise

    def counting(documents, tokenizer, seed):
        piece = tokenise(documents, tokenizer, seed)
        tokenised.extend(r["id"] for r in piece.records)
        if len(tokenised) > stop_after:
            raise KeyboardInterrupt
        return piece

    monkeypatch.setattr(pieces, "tokenise", counting)
    stop_after = 60
    with pytest.raises(KeyboardInterrupt):
        _prepare(prepared, tmp_path / "out")
    kept = [p for p in (tmp_path / "out.pieces").glob("*.npz")]
    finished = [r["id"] for p in kept for r in pieces.load(p).records]
    assert 0 < len(finished) < 131

    # the second run is stopped while TFDS writes
    write = dataset.write

    def stopped(directory, **arguments):
        (directory / "prepared_corpus" / "incomplete.AB12CD_1.0.0").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(dataset, "write", stopped)
    stop_after = 10**6
    tokenised.clear()
    with pytest.raises(KeyboardInterrupt):
        _prepare(prepared, tmp_path / "out")
    assert sorted(tokenised + finished) == sorted(r["id"] for r in prepared.records)
    assert list((tmp_path / "out.partial").rglob("incomplete*"))

    monkeypatch.setattr(dataset, "write", write)
    tokenised.clear()
    result = _prepare(prepared, tmp_path / "out")
    assert tokenised == [] and result.pieces_tokenised == 0 and result.pieces_reused > 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert not list((tmp_path / "out").rglob("*incomplete*"))
    assert _same_data(pipeline.open(tmp_path / "out"), prepared.data)


def test_pieces_of_another_tokenizer_seed_or_input_are_not_reused(prepared, tmp_path):
    piece = corpora.Slice("dolma", "a", 1, b"x")
    other = tokenizer_lib.Tokenizer(prepared.tokenizer.json + b" ")
    paths = {
        pieces.path_for(piece, prepared.tokenizer, 0, "stop", tmp_path),
        pieces.path_for(piece, other, 0, "stop", tmp_path),
        pieces.path_for(piece, prepared.tokenizer, 1, "stop", tmp_path),
        pieces.path_for(piece, prepared.tokenizer, 0, "skip", tmp_path),
        pieces.path_for(
            corpora.Slice("dolma", "a", 1, b"y"), prepared.tokenizer, 0, "stop", tmp_path
        ),
    }
    assert len(paths) == 5


def test_the_same_request_is_not_done_twice_and_another_is_refused(prepared, tmp_path):
    said = []
    again = _prepare(prepared, prepared.path, announce=said.append)
    assert again.info == prepared.result.info and again.pieces_tokenised == 0
    assert "already prepared" in said[0]
    with pytest.raises(ValueError, match="was prepared with other validation_fraction, seed"):
        _prepare(prepared, prepared.path, seed=1, validation_fraction=0.2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="mine: exists, but not as prepared data"):
        _prepare(prepared, tmp_path / "mine")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["mine", "thesis.tex"]


def test_it_says_beforehand_what_it_reads_and_writes_and_how_long(prepared, tmp_path):
    said = []
    _prepare(prepared, tmp_path / "out", announce=said.append)
    assert len(said) == 1
    assert "reading" in said[0] and "writing about" in said[0] and "expected time" in said[0]


def test_a_full_disk_is_noticed_beforehand(prepared, tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(preparation.shutil, "disk_usage", lambda path: usage(9, 9, 1000))
    with pytest.raises(ValueError, match="needs about .* GB of disk"):
        _prepare(prepared, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_bad_records_stop_or_are_counted(prepared, tmp_path):
    lines = prepared.corpus.read_text().splitlines()
    lines[40:40] = ['{"text": "cut sho', '{"id": "no text"}']
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    bad = [str(tmp_path / "bad.jsonl")]
    for workers in (0, 2):
        with pytest.raises(ValueError, match="bad.jsonl, line 41: not a JSON object"):
            _prepare(prepared, tmp_path / "out", bad, workers=workers)
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    result = _prepare(prepared, tmp_path / "out", bad, on_error="skip")
    assert result.info.skipped_records == 2
    assert [m.split(":")[0] for m in result.messages] == [
        "bad.jsonl, line 41",
        "bad.jsonl, line 42",
    ]
    assert result.info.num_documents == 131


def test_a_truncated_archive_stops_and_can_be_skipped(prepared, tmp_path):
    packed = gzip.compress(prepared.corpus.read_bytes())
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    cut = [str(tmp_path / "cut.jsonl.gz")]
    with pytest.raises(ValueError, match="cut.jsonl.gz: damaged or cut short after line"):
        _prepare(prepared, tmp_path / "out", cut)
    result = _prepare(prepared, tmp_path / "out", cut, on_error="skip")
    assert result.info.skipped_records == 1
    assert 0 < result.info.num_documents < 131


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": ""}\n'])
def test_an_empty_corpus_is_an_error(prepared, tmp_path, content):
    (tmp_path / "empty.jsonl").write_text(content)
    with pytest.raises(ValueError, match="the corpus is empty"):
        _prepare(prepared, tmp_path / "out", [str(tmp_path / "empty.jsonl")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"validation_fraction": 1.0}, "validation_fraction=1.0"),
        ({"workers": -1}, "workers=-1"),
        ({"on_error": "never"}, "on_error=never"),
    ],
)
def test_arguments_are_checked(prepared, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        _prepare(prepared, tmp_path / "out", **arguments)


def test_a_tokenizer_is_trained_and_text_files_are_domains(prepared, tmp_path):
    texts = [r["text"] for r in prepared.records]
    (tmp_path / "one.txt").write_text("\n".join(texts[:70]))
    (tmp_path / "two.txt").write_text("\n".join(texts[70:]))
    result = preparation.prepare(
        [f"{tmp_path}/*.txt"], tmp_path / "out", sequence_length=11, vocab_size=283,
        announce=lambda line: None,
    )  # fmt: skip
    assert result.info.vocab_size == 283 and result.info.domains == ("one", "two")
    data = pipeline.open(tmp_path / "out")
    assert data.tokenizer.sha256 == result.info.tokenizer_sha256
    with pytest.raises(ValueError, match="vocab_size=100"):
        preparation.prepare(
            [f"{tmp_path}/*.txt"], tmp_path / "o", sequence_length=11, vocab_size=100
        )


def test_the_embedded_corpus_is_prepared_once(tmp_path, monkeypatch, prepared):
    built = []

    def build():
        built.append(1)
        return [corpora.Document(r["id"], r["text"], "s", r["source"]) for r in prepared.records]

    monkeypatch.setattr(embedded, "build", build)
    arguments = {"sequence_length": 23, "vocab_size": 293}
    path = pipeline.ensure_embedded(tmp_path, **arguments)
    assert pipeline.ensure_embedded(tmp_path, **arguments) == path
    assert built == [1]
    assert pipeline.open(path).info.domains == ("books", "code", "wiki")
    named = pipeline.ensure_embedded(tmp_path, **arguments, tokenizer=str(prepared.tokenizer_file))
    assert named != path
    assert pipeline.open(named).info.tokenizer_sha256 == prepared.tokenizer.sha256
    (path / "documents.jsonl").unlink()
    with pytest.raises(ValueError, match="documents.jsonl is missing"):
        pipeline.ensure_embedded(tmp_path, **arguments)


def _write_corpus(path, size, seed):
    """Writes about `size` bytes of Dolma lines; returns the texts that they are made of."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9))) for _ in range(5000)]
    texts = [" ".join(rng.choices(words, k=rng.randint(50, 1500))) for _ in range(400)]
    written, number = 0, 0
    with open(path, "w") as file:
        while written < size:
            text = f"{number} {texts[number % len(texts)]}"
            record = {"id": str(number), "text": text, "source": "abc"[number % 3]}
            written += file.write(json.dumps(record) + "\n")
            number += 1
    return texts


PREPARE_AND_MEASURE = """
import resource, sys
from olmoe_jax.data import preparation
if __name__ == "__main__":
    preparation.prepare([sys.argv[1]], sys.argv[2], sequence_length=1024, tokenizer=sys.argv[3],
                        workers=2, announce=lambda line: None)
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    print("peak", *[resource.getrusage(w).ru_maxrss for w in whose])
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    script = tmp_path / "measure.py"
    script.write_text(PREPARE_AND_MEASURE)
    peaks = {}
    for megabytes in (50, 500):
        texts = _write_corpus(tmp_path / "corpus.jsonl", megabytes * 10**6, seed=1)
        tokenizer = tokenizer_lib.train(texts, vocab_size=8192)  # whole words: fewer tokens
        (tmp_path / "bpe.json").write_bytes(tokenizer.json)
        output = tmp_path / f"out{megabytes}"
        arguments = [tmp_path / "corpus.jsonl", output, tmp_path / "bpe.json"]
        done = subprocess.run(
            [sys.executable, script, *arguments], cwd=ROOT, capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        print(megabytes, "MB:", done.stdout)
        peaks[megabytes] = [int(n) for n in done.stdout.split("peak")[1].split()]
    for small, large in zip(peaks[50], peaks[500], strict=True):  # this process, the largest worker
        assert large <= 1.1 * small, peaks


@pytest.mark.slow
def test_a_real_kill_loses_no_tokenised_piece(prepared, tmp_path):
    _write_corpus(tmp_path / "corpus.jsonl", 14 * 10**6, seed=2)
    command = [
        sys.executable, "-m", "experiments.prepare_data", f"--input={tmp_path}/corpus.jsonl",
        f"--tokenizer={prepared.tokenizer_file}", f"--output={tmp_path}/out",
        "--sequence_length=512", f"--json={tmp_path}/result.json",
    ]  # fmt: skip
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=ROOT, **silent)
    kept = tmp_path / "out.pieces"
    while len(list(kept.glob("*.npz"))) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {p: p.stat().st_mtime_ns for p in kept.glob("*.npz")}
    assert not (tmp_path / "out").exists()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["pieces_reused"] == len(before) and result["pieces_tokenised"] > 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus.jsonl", "out", "result.json"]


@pytest.mark.slow
@pytest.mark.skipif(not REAL_DATA.exists(), reason="the texts of the five domains are not here")
def test_the_five_domains_with_the_olmoe_tokenizer(tmp_path):
    (tokenizer,) = (REAL_DATA / "tokenizer").glob("*.json")
    result = preparation.prepare(
        [f"{REAL_DATA}/domains/*.txt"], tmp_path / "out", sequence_length=512,
        tokenizer=str(tokenizer), announce=lambda line: None,
    )  # fmt: skip
    info = result.info
    assert info.vocab_size == 50280 and info.end_of_document == 50279
    assert info.domains == ("arxiv", "books", "c4", "github", "wikipedia")
    assert set(info.splits["validation"].domain_tokens) == set(info.domains)
    size = sum(p.stat().st_size for p in (REAL_DATA / "domains").iterdir())
    assert sum(s.text_bytes for s in info.splits.values()) == size
