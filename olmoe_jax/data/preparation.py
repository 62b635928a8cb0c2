"""Corpora → a directory of prepared data: tokenised, split by document, packed into windows, written with TFDS.

    DIR/info.json             what it is (`Info`); its presence says that the directory is complete
    DIR/tokenizer.json        the tokenizer
    DIR/dataset/              the TFDS dataset: splits train and validation
    DIR/documents.jsonl       one line per document, with documents.offsets.npy for access by number
    DIR/unigram_counts.npy    int64 [vocab]: how often each token occurs in train

The work happens in two folders beside DIR. DIR.pieces keeps what has been tokenised until everything is done, because
TFDS starts over after a kill; DIR.partial becomes DIR by one rename.
"""

import collections
import dataclasses
import hashlib
import heapq
import json
import os
import pathlib
import shutil
import time

import numpy as np
from absl import logging
from tqdm import tqdm

from olmoe_jax.data import corpora, embedded, pieces, tokenizer as tokenizer_lib

FORMAT = 1
EMBEDDED = "embedded"
SPLITS = ("train", "validation")
MAX_DOMAINS = 255
TRAINING_TEXT_BYTES = 64 << 20  # of the input, for a tokenizer trained on it
PADDING_DOCUMENT = -1


@dataclasses.dataclass(frozen=True)
class SplitInfo:
    """One split in numbers. `tokens` counts end-of-document tokens, `text_bytes` is UTF-8; both per domain too."""

    windows: int
    documents: int
    tokens: int
    text_bytes: int
    domain_tokens: dict[str, int]
    domain_text_bytes: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Info:
    """What a prepared directory holds; `files` maps each file to its size."""

    format: int
    sequence_length: int
    tokenizer_sha256: str
    vocab_size: int
    end_of_document: int
    domains: tuple[str, ...]
    splits: dict[str, SplitInfo]
    num_documents: int
    skipped_records: int
    request: dict
    files: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Result:
    """What `prepare` did."""

    path: pathlib.Path
    info: Info
    pieces_tokenised: int
    pieces_reused: int
    seconds: float
    messages: tuple[str, ...] = ()


def prepare(
    inputs,
    output,
    *,
    sequence_length,
    tokenizer=None,
    vocab_size=4096,
    validation_fraction=0.01,
    on_error="stop",
    workers=0,
    seed=0,
    announce=logging.info,
    progress=True,
) -> Result:
    """Prepares a corpus; running it again after a kill goes on from the pieces that exist.

    Args:
      inputs: globs of Dolma or text files; "embedded" stands for the embedded corpus.
      output: directory to create. If it exists and was prepared from the same request, it is returned as it is.
      sequence_length: tokens per window. Documents go on from window to window; the last window is padded.
      tokenizer: path of a tokenizer.json; None trains one of `vocab_size` tokens on the input.
      validation_fraction: share of documents held out, by a hash of their text. A domain of several
        documents gets at least one window's worth, up to half of it.
      on_error: "stop" at a bad record, or "skip" and count.
      workers: tokenising processes; 0 uses threads here.
      seed: of the split.
      announce: takes the lines that say what will be done.
    Raises:
      ValueError, FileNotFoundError: bad input; nothing is lost, and nothing half-written is left at `output`.
    """
    start = time.time()
    if sequence_length < 2:
        raise ValueError(f"--sequence_length={sequence_length}: must be at least 2")
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"--validation_fraction={validation_fraction}: must lie in [0, 1)")
    output = pathlib.Path(os.path.expanduser(output))
    source = _Input(inputs, corpora.Problems(on_error))
    named = tokenizer_lib.load(tokenizer) if tokenizer else None
    request = {
        "inputs": source.identity(),
        "tokenizer": named.sha256 if named else f"trained, vocab_size={vocab_size}",
        "sequence_length": sequence_length,
        "validation_fraction": validation_fraction,
        "on_error": on_error,
        "seed": seed,
    }
    partial, kept = (output.with_name(output.name + suffix) for suffix in (".partial", ".pieces"))
    if output.exists():
        info = _existing(output, request)
        shutil.rmtree(kept, ignore_errors=True)
        announce(f"{output}: already prepared")
        return Result(output, info, 0, 0, time.time() - start)
    shutil.rmtree(partial, ignore_errors=True)  # with TFDS's incomplete.* in it
    partial.mkdir(parents=True)
    kept.mkdir(exist_ok=True)

    tokenizer = named or _trained(source, vocab_size, kept, request, announce)
    announce(_estimate(source, tokenizer, workers, output))
    written = []
    bar = tqdm(total=source.bytes, desc="tokenising", unit="B", unit_scale=True, disable=None if progress else True)
    with bar:
        arguments = {"seed": seed, "on_error": on_error, "directory": kept, "workers": workers}
        for item in pieces.write_all(source.slices(), tokenizer, **arguments):
            source.problems.merge(item.skipped, item.messages)
            written.append(item)
            bar.update(min(item.input_bytes, bar.total - bar.n))
    plan = _plan([w.path for w in written], validation_fraction, sequence_length)
    info = _write(partial, plan, tokenizer, sequence_length, source, request)
    os.replace(partial, output)
    shutil.rmtree(kept)
    reused = sum(w.reused for w in written)
    return Result(
        output, info, len(written) - reused, reused, time.time() - start, tuple(source.problems.messages)
    )


class _Input:
    """The files of a request, and the embedded corpus if it is named."""

    def __init__(self, inputs, problems):
        self.problems = problems
        self.embedded = EMBEDDED in inputs
        patterns = [i for i in inputs if i != EMBEDDED]
        self.paths = corpora.expand(patterns) if patterns or not self.embedded else []
        if not self.paths and not self.embedded:
            raise ValueError("--input names no file")
        self._documents = None

    def documents(self):
        """The embedded corpus, built once."""
        if self._documents is None:
            self._documents = embedded.build()
        return self._documents

    @property
    def bytes(self):
        own = sum(len(d.text.encode()) for d in self.documents()) if self.embedded else 0
        return own + sum(os.path.getsize(p) for p in self.paths)

    def identity(self):
        """What decides whether a directory was prepared from the same input."""
        files = [[os.path.basename(p), os.path.getsize(p), os.stat(p).st_mtime_ns] for p in self.paths]
        return files + ([[EMBEDDED, embedded.fingerprint()]] if self.embedded else [])

    def slices(self, problems=None):
        if self.embedded:
            yield from corpora.slices_of(self.documents())
        for path in self.paths:
            yield from corpora.slices(path, problems or self.problems)


def _existing(output, request):
    """Info of a finished output that answers the request; ValueError if it is something else."""
    try:
        info = read_info(output)
    except (FileNotFoundError, ValueError):
        raise ValueError(f"--output={output}: exists and is not prepared data; name another directory") from None
    different = [k for k in request if info.request.get(k) != request[k]]
    if different:
        raise ValueError(
            f"--output={output}: was prepared with other {', '.join(different)}; remove it or name another directory"
        )
    return info


def _trained(source, vocab_size, kept, request, announce):
    """A tokenizer trained on (a sample of) the input; kept beside the pieces for a rerun."""
    path = kept / f"tokenizer-{abs(hash_of(request)):016x}.json"
    if path.exists():
        return tokenizer_lib.load(path)
    announce(f"training a tokenizer of {vocab_size:,} tokens")
    share = TRAINING_TEXT_BYTES / max(source.bytes, 1)
    problems = corpora.Problems("skip")  # bad records are reported when they are tokenised

    def texts():
        for piece in source.slices(problems):
            for document in corpora.documents(piece, problems):
                if share >= 1 or pieces.split_key(document.text, "tokenizer") < share:
                    yield document.text

    tokenizer = tokenizer_lib.train(texts(), vocab_size=vocab_size)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(tokenizer.json)
    os.replace(temporary, path)
    return tokenizer


def hash_of(value) -> int:
    """64-bit hash of a JSON value, the same in every process."""
    return int.from_bytes(hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()[:8], "little")


def _estimate(source, tokenizer, workers, output):
    """One line: bytes to read, bytes to write, expected time, from the first megabyte of the input."""
    problems = corpora.Problems("skip")
    first = next(source.slices(problems), None)
    if first is None:
        raise ValueError(f"{', '.join(source.paths)}: the corpus is empty")
    start, texts, size = time.time(), [], 0
    for document in corpora.documents(first, problems):
        texts.append(document.text)
        size += len(document.text.encode())
        if size >= 1 << 20:
            break
    tokens = sum(map(len, tokenizer.encode_batch(texts)))
    rate = max(size, 1) / max(time.time() - start, 1e-3)
    packed = [p for p in source.paths if p.endswith((".gz", ".zst"))]
    text = source.bytes + 2 * sum(map(os.path.getsize, packed))  # text compresses about threefold
    num_tokens = text * tokens / max(size, 1)
    seconds = text / (rate * max(1, workers)) + num_tokens / 2e6
    free = shutil.disk_usage(output.parent).free
    needed = num_tokens * 12
    if needed > free:
        raise ValueError(f"{output}: needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free there")
    return (
        f"reading {source.bytes / 1e6:,.1f} MB, writing about {num_tokens * 6 / 1e6:,.0f} MB "
        f"({num_tokens / 1e6:,.1f}M tokens; at most {needed / 1e6:,.0f} MB while at it), expected time {seconds:,.0f} s"
    )


def _write(directory, plan, tokenizer, sequence_length, source, request):
    """Writes everything below `directory`, info.json last."""
    from olmoe_jax.data import dataset  # TFDS takes a second to import

    splits, num_documents = _write_documents(directory, plan, sequence_length)
    counts = np.zeros(tokenizer.vocab_size, np.int64)

    def windows(split):
        for window in _windows(plan, split, sequence_length):
            if split == "train":
                real = window["tokens"][window["documents"] != PADDING_DOCUMENT]
                np.add(counts, np.bincount(real, minlength=len(counts)), out=counts)
            yield window

    dataset.write(
        directory / "dataset",
        sequence_length=sequence_length,
        splits={s: (splits[s].windows, lambda s=s: windows(s)) for s in SPLITS},
    )
    np.save(directory / "unigram_counts.npy", counts)
    (directory / "tokenizer.json").write_bytes(tokenizer.json)
    info = Info(
        format=FORMAT,
        sequence_length=sequence_length,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        end_of_document=tokenizer.end_of_document,
        domains=plan.domains,
        splits=splits,
        num_documents=num_documents,
        skipped_records=source.problems.count,
        request=request,
        files={p.relative_to(directory).as_posix(): p.stat().st_size for p in sorted(directory.rglob("*")) if p.is_file()},
    )
    (directory / "info.json").write_text(json.dumps(dataclasses.asdict(info), indent=2) + "\n")
    return info


