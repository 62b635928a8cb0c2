"""Corpora → a directory of prepared data: tokenised, split, packed into windows, written by TFDS.

`layout` says what lies in it. The work happens in two folders beside it: DIR.pieces keeps what has
been tokenised until everything is done, because TFDS starts over after a kill; DIR.partial becomes
DIR by one rename.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import time

import numpy as np
from absl import logging
from tqdm import tqdm

from olmoe_jax import files
from olmoe_jax.data import corpora, embedded, layout, packing, pieces
from olmoe_jax.data import tokenizer as tokenizer_lib

EMBEDDED = "embedded"
TRAINING_TEXT_BYTES = 64 << 20  # sampled from the input, for a tokenizer trained on it
SAMPLE_BYTES = 1 << 20  # tokenised beforehand, to tell how long the rest will take
DISK_BYTES_PER_TOKEN = 3.5  # of prepared data
PIECE_BYTES_PER_TOKEN = 4
WINDOW_TOKENS_PER_SECOND = 2e6


@dataclasses.dataclass(frozen=True)
class Result:
    """What `prepare` did.

    Attributes:
      pieces_tokenised, pieces_reused: slices of the input; reused ones were left by a killed run.
      messages: the first of the records that were skipped.
    """

    path: pathlib.Path
    info: layout.Info
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
) -> Result:
    """Prepares a corpus; running it again after a kill goes on from the pieces that exist.

    Args:
      inputs: globs of Dolma or text files; "embedded" stands for the embedded corpus.
      output: directory to create. If it exists and answers the same request, it is returned as it
        is.
      sequence_length: tokens per window. Documents go on from window to window; the last window is
        padded.
      tokenizer: path of a tokenizer.json; None trains one of `vocab_size` tokens on the input.
      validation_fraction: share of documents held out (see `packing.plan`).
      on_error: "stop" at a bad record, or "skip" and count.
      workers: tokenising processes; 0 uses threads here.
      seed: of the split.
      announce: takes the lines that say what will be done.
    Raises:
      ValueError, FileNotFoundError: bad input. Nothing is at `output` then.
    """
    start = time.time()
    if sequence_length < 2:
        raise ValueError(f"--sequence_length={sequence_length}: must be at least 2")
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"--validation_fraction={validation_fraction}: must lie in [0, 1)")
    if workers < 0:
        raise ValueError(f"--workers={workers}: must not be negative")
    output = pathlib.Path(os.path.abspath(os.path.expanduser(output)))
    source = _Input(inputs, corpora.Problems(on_error))
    named = tokenizer_lib.load(tokenizer) if tokenizer else None
    if named is None and vocab_size < tokenizer_lib.MIN_VOCAB_SIZE:
        raise ValueError(
            f"--vocab_size={vocab_size}: must be at least {tokenizer_lib.MIN_VOCAB_SIZE}"
        )
    request = {
        "inputs": source.identity(),
        "tokenizer": named.sha256 if named else f"trained, vocab_size={vocab_size}",
        "sequence_length": sequence_length,
        "validation_fraction": validation_fraction,
        "on_error": on_error,
        "seed": seed,
    }
    with _workplace(output) as (partial, kept):
        if output.exists():
            announce(f"{output}: already prepared")
            return Result(output, _existing(output, request), 0, 0, time.time() - start)
        if source.is_embedded:
            announce("collecting the embedded corpus from what is installed")
        tokenizer = named or _trained(source, vocab_size, kept, request, announce)
        announce(_estimate(source, tokenizer, workers, output))
        arguments = {"seed": seed, "on_error": on_error, "directory": kept, "workers": workers}
        written = []
        with tqdm(
            total=source.bytes, desc="tokenising", unit="B", unit_scale=True, disable=None
        ) as bar:
            for item in pieces.write_all(source.slices(), tokenizer, **arguments):
                source.problems.merge(item.skipped, item.messages)
                written.append(item)
                bar.update(min(item.input_bytes, bar.total - bar.n))
        plan = packing.plan([w.path for w in written], validation_fraction, sequence_length)
        info = _write(partial, plan, tokenizer, sequence_length, source.problems.count, request)
        os.replace(partial, output)
    reused = sum(w.reused for w in written)
    messages = tuple(source.problems.messages)
    return Result(output, info, len(written) - reused, reused, time.time() - start, messages)


@contextlib.contextmanager
def _workplace(output):
    """Gives (empty folder for the result, folder of pieces), to one process at a time.

    Both are gone afterwards; after an error or a kill the pieces stay.
    """
    partial, kept = (output.with_name(output.name + suffix) for suffix in (".partial", ".pieces"))
    kept.mkdir(parents=True, exist_ok=True)
    # Waits for another process that prepares the same output, and then finds it done.
    with files.locked(kept / "lock"):
        shutil.rmtree(partial, ignore_errors=True)  # with TFDS's incomplete.* in it
        if not output.exists():
            partial.mkdir()
        try:
            yield partial, kept
        except Exception:
            shutil.rmtree(partial, ignore_errors=True)
            if os.listdir(kept) == ["lock"]:
                shutil.rmtree(kept)
            raise
        shutil.rmtree(kept, ignore_errors=True)


class _Input:
    """The files of a request, and the embedded corpus if it is named."""

    def __init__(self, inputs, problems):
        self.problems = problems
        self.is_embedded = EMBEDDED in inputs
        patterns = [i for i in inputs if i != EMBEDDED]
        if not inputs:
            raise ValueError("--input names no file")
        self.paths = corpora.expand(patterns)
        root = os.path.commonpath(
            [os.path.dirname(os.path.abspath(p)) for p in self.paths] or ["."]
        )
        self._names = [os.path.relpath(p, root) for p in self.paths]
        self._documents = None

    def documents(self):
        """The embedded corpus, built once."""
        if self._documents is None:
            self._documents = embedded.build()
        return self._documents

    @property
    def bytes(self):
        """To be read."""
        own = sum(len(d.text.encode()) for d in self.documents()) if self.is_embedded else 0
        return own + sum(os.path.getsize(p) for p in self.paths)

    @property
    def text_bytes(self):
        """About what the input unpacks to: text compresses threefold."""
        return self.bytes + 2 * sum(
            os.path.getsize(p) for p in self.paths if p.endswith((".gz", ".zst"))
        )

    def identity(self):
        """What decides whether a directory was prepared from the same input."""
        found = [
            [name, os.path.getsize(path), os.stat(path).st_mtime_ns]
            for name, path in zip(self._names, self.paths, strict=True)
        ]
        return found + ([[EMBEDDED, embedded.fingerprint()]] if self.is_embedded else [])

    def slices(self, problems=None):
        """All slices of the input, in order."""
        if self.is_embedded:
            yield from corpora.slices_of(self.documents())
        for name, path in zip(self._names, self.paths, strict=True):
            yield from corpora.slices(path, problems or self.problems, name=name)


def _existing(output, request):
    """Info of a finished output that answers the request; ValueError if it is something else."""
    try:
        info = layout.read_info(output)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"--output={output}: exists, but not as prepared data ({error})") from None
    different = [name for name in request if info.request.get(name) != request[name]]
    if different:
        raise ValueError(
            f"--output={output}: was prepared with other {', '.join(different)}; "
            "remove it or name another directory"
        )
    return info


def _trained(source, vocab_size, kept, request, announce):
    """A tokenizer trained on (a sample of) the input; kept beside the pieces for a rerun."""
    name = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:16]
    path = kept / f"tokenizer-{name}.json"
    if path.exists():
        return tokenizer_lib.load(path)
    announce(f"training a tokenizer of {vocab_size:,} tokens")
    share = TRAINING_TEXT_BYTES / max(source.text_bytes, 1)
    problems = corpora.Problems("skip")  # they are reported when tokenised

    def texts():
        for piece in source.slices(problems):
            for document in corpora.documents(piece, problems):
                if share >= 1 or pieces.split_key(document.text, "tokenizer") < share:
                    yield document.text

    tokenizer = tokenizer_lib.train(texts(), vocab_size=vocab_size)
    with files.whole(path) as file:
        file.write(tokenizer.json)
    return tokenizer


def _estimate(source, tokenizer, workers, output):
    """One line: bytes to read and to write, and the time, judged by the input's first megabyte.

    Raises:
      ValueError: the disk has not enough room.
    """
    problems, texts, size, start = corpora.Problems("skip"), [], 0, time.time()
    for document in corpora.documents(next(source.slices(problems), corpora.NOTHING), problems):
        texts.append(document.text)
        size += len(document.text.encode())
        if size >= SAMPLE_BYTES:
            break
    sampled_tokens = sum(map(len, tokenizer.encode_batch(texts)))
    rate = max(size, 1) / max(time.time() - start, 1e-3)
    tokens = source.text_bytes * sampled_tokens / max(size, 1)
    # the sample was tokenised on all cores, as is the input without workers
    speed = rate * (max(1, workers) / os.cpu_count() if workers > 1 else 1)
    seconds = source.text_bytes / speed + tokens / WINDOW_TOKENS_PER_SECOND
    at_work = tokens * (DISK_BYTES_PER_TOKEN + PIECE_BYTES_PER_TOKEN)
    if at_work > (free := shutil.disk_usage(output.parent).free):
        raise ValueError(
            f"{output}: needs about {at_work / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free"
        )
    return (
        f"reading {source.bytes / 1e6:,.1f} MB, writing about "
        f"{tokens * DISK_BYTES_PER_TOKEN / 1e6:,.1f} MB ({tokens / 1e6:,.2f}M tokens; "
        f"{at_work / 1e6:,.1f} MB while at it), expected time {max(seconds, 1):,.0f} s"
    )


def _write(directory, plan, tokenizer, sequence_length, skipped, request):
    """Writes everything below `directory`, info.json last."""
    from olmoe_jax.data import dataset  # TFDS takes a while to import

    splits, num_documents = packing.write_documents(directory, plan, sequence_length)
    counts = np.zeros(tokenizer.vocab_size, np.int64)

    def windows(split):
        for window in packing.windows(plan, split, sequence_length):
            if split == "train":
                real = window["tokens"][window["documents"] != layout.PADDING_DOCUMENT]
                np.add.at(counts, real, 1)
            yield window

    dataset.write(
        directory / layout.DATASET,
        sequence_length=sequence_length,
        splits={s: (splits[s].windows, lambda s=s: windows(s)) for s in layout.SPLITS},
    )
    np.save(directory / layout.UNIGRAM_COUNTS, counts)
    (directory / layout.TOKENIZER).write_bytes(tokenizer.json)
    return layout.write_info(
        directory,
        sequence_length=sequence_length,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        end_of_document=tokenizer.end_of_document,
        domains=plan.domains,
        splits=splits,
        num_documents=num_documents,
        skipped_records=skipped,
        request=request,
    )
