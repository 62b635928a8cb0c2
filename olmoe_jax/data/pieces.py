"""Tokenised pieces: one file per slice of the input, named by the hash of slice and tokenizer.

They outlive a killed run: a rerun tokenises only what is missing. Writing them is the only parallel
part of preparing data, and the only one that costs more than copying.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import os
import pathlib

import numpy as np

from olmoe_jax import files
from olmoe_jax.data import corpora
from olmoe_jax.data import tokenizer as tokenizer_lib

FORMAT = 1
BATCH_BYTES = 512 << 10  # text encoded at once: what the library returns is 50 times as large
FIRST_WORDS, FIRST_CHARACTERS = 12, 80


@dataclasses.dataclass(frozen=True)
class Piece:
    """Documents of one slice, tokenised; each document ends with the end-of-document token.

    Attributes:
      tokens: uint32 [tokens] of all documents, one after the other.
      lengths, text_bytes: int64 [documents]: tokens (end-of-document included), and UTF-8 bytes of
        the text.
      keys: float64 [documents] in [0, 1): hash of the text, by which documents are split.
      records: per document {"id", "source", "domain", "first_words"}.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    text_bytes: np.ndarray
    keys: np.ndarray
    records: list[dict]


@dataclasses.dataclass(frozen=True)
class Written:
    """What became of one slice: the piece's path and what was dropped on the way."""

    path: str
    reused: bool
    input_bytes: int
    skipped: int
    messages: tuple[str, ...]


def path_for(piece: corpora.Slice, tokenizer, seed, on_error, directory) -> pathlib.Path:
    """Where the tokenised piece of a slice lies."""
    key = f"{FORMAT} {piece.sha256()} {tokenizer.sha256} {seed} {on_error}"
    return pathlib.Path(directory) / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.npz"


def split_key(text, seed) -> float:
    """Number in [0, 1) made from the text alone, so that copies of a text fall into one split."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, salt=str(seed).encode()[:16]).digest()
    return int.from_bytes(digest, "little") / 2**64


def tokenise(documents, tokenizer, seed) -> Piece:
    """Documents → Piece."""
    end = np.array([tokenizer.end_of_document], np.uint32)
    tokens, text_bytes, keys, records, batch, size = [], [], [], [], [], 0

    def flush():
        for ids in tokenizer.encode_batch(batch):
            tokens.append(np.concatenate([ids, end]))
        batch.clear()

    for document in documents:
        batch.append(document.text)
        text_bytes.append(len(document.text.encode()))
        keys.append(split_key(document.text, seed))
        first_words = " ".join(document.text[:1000].split()[:FIRST_WORDS])[:FIRST_CHARACTERS]
        records.append(
            {
                "id": document.id,
                "source": document.source,
                "domain": document.domain,
                "first_words": first_words,
            }
        )
        size += text_bytes[-1]
        if size >= BATCH_BYTES:
            flush()
            size = 0
    flush()
    return Piece(
        tokens=np.concatenate(tokens) if tokens else np.zeros(0, np.uint32),
        lengths=np.array([len(t) for t in tokens], np.int64),
        text_bytes=np.array(text_bytes, np.int64),
        keys=np.array(keys, np.float64),
        records=records,
    )


def save(piece: Piece, path, dropped=(0, ())):
    """Writes a piece, whole or not at all. `dropped`: (count, messages) of bad records."""
    table = json.dumps(
        {"records": piece.records, "skipped": dropped[0], "messages": list(dropped[1])}
    )
    with files.whole(path) as file:
        np.savez(
            file,
            tokens=piece.tokens,
            lengths=piece.lengths,
            text_bytes=piece.text_bytes,
            keys=piece.keys,
            table=np.frombuffer(table.encode(), np.uint8),
        )


def load(path) -> Piece:
    """Reads a piece back."""
    with np.load(path) as file:
        table = json.loads(file["table"].tobytes())
        return Piece(
            file["tokens"], file["lengths"], file["text_bytes"], file["keys"], table["records"]
        )


def _dropped(path):
    with np.load(path) as file:
        table = json.loads(file["table"].tobytes())
        return table["skipped"], tuple(table["messages"])


def _write(piece, tokenizer, seed, on_error, directory):
    """Tokenises one slice unless that is done already. Runs in a worker."""
    path = path_for(piece, tokenizer, seed, on_error, directory)
    reused = path.exists()
    if not reused:
        problems = corpora.Problems(on_error)
        tokenised = tokenise(corpora.documents(piece, problems), tokenizer, seed)
        save(tokenised, path, (problems.count, problems.messages))
    skipped, messages = _dropped(path)
    return Written(str(path), reused, len(piece.payload), skipped, messages)


_WORKER_TOKENIZER = None


def _start_worker(json_bytes):
    global _WORKER_TOKENIZER
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core per worker
    _WORKER_TOKENIZER = tokenizer_lib.Tokenizer(json_bytes)


def _write_in_worker(piece, seed, on_error, directory):
    return _write(piece, _WORKER_TOKENIZER, seed, on_error, directory)


def write_all(slices, tokenizer, *, seed, on_error, directory, workers):
    """Tokenises slices into pieces and yields a `Written` for each, in order.

    Args:
      workers: processes; 0 or 1 tokenises here, on the threads of the tokenizers library.
    """
    if workers <= 1:
        for piece in slices:
            yield _write(piece, tokenizer, seed, on_error, directory)
        return
    # spawn: a fork of a process that runs JAX's or tokenizers' threads can hang
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start_worker, initargs=(tokenizer.json,)
    )
    pending = collections.deque()
    try:
        for piece in slices:
            pending.append(pool.submit(_write_in_worker, piece, seed, on_error, directory))
            if len(pending) >= 2 * workers:  # bounds the slices held in memory
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except concurrent.futures.process.BrokenProcessPool:
        raise OSError(
            "a tokenising process was killed (out of memory?); run again, with fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
