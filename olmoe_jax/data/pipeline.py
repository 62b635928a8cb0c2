"""Prepared data → batches, by step number and nothing else.

Which windows make up step s follows from the seed: window number g = s · batch_size + row lies in
epoch g // num_windows, at that epoch's place in a global shuffle (grain's). So resuming needs the
step only, and any number of processes or reading workers sees the same batches.
"""

import functools
import hashlib
import json
import os
import pathlib

import grain
import numpy as np

from olmoe_jax.data import layout, preparation
from olmoe_jax.data import tokenizer as tokenizer_lib

MAX_NGRAM, MAX_REPEATS = 13, 32  # OLMoE: the filter on documents, and on windows while training
READ_AHEAD = 4
EMBEDDED_VALIDATION_FRACTION = 0.05


class PreparedData:
    """A directory written by `preparation.prepare`, opened for reading. Pickles as its path."""

    def __init__(self, path, info):
        self.path, self.info, self._sources = pathlib.Path(path), info, {}

    def __reduce__(self):
        return (PreparedData, (self.path, self.info))

    def __repr__(self):
        return f"PreparedData({str(self.path)!r})"

    def num_windows(self, split) -> int:
        """Windows of a split, "train" or "validation"."""
        return self.info.splits[split].windows

    def read_windows(self, split, indices) -> dict[str, np.ndarray]:
        """Windows by index: tokens and documents int32, domains uint8; [len(indices), length]."""
        rows = self._source(split).__getitems__([int(i) for i in indices])
        return {k: np.stack([row[k] for row in rows]) for k in ("tokens", "documents", "domains")}

    def _source(self, split):
        if split not in self._sources:
            from olmoe_jax.data import dataset  # TFDS takes a while to import

            self._sources[split] = dataset.read(self.path / layout.DATASET, split)
        return self._sources[split]

    @functools.cached_property
    def _offsets(self):
        return np.memmap(self.path / layout.OFFSETS, np.dtype("<i8"), "r")

    def document(self, index) -> layout.DocumentRecord:
        """The document of number `index`, as in a batch's `documents`."""
        if not 0 <= index < self.info.num_documents:
            raise ValueError(
                f"{self.path}: no document {index}: "
                f"they are numbered from 0 to {self.info.num_documents - 1}"
            )
        start, end = (int(o) for o in self._offsets[index : index + 2])
        with (self.path / layout.DOCUMENTS).open("rb") as file:
            file.seek(start)
            return layout.DocumentRecord(**json.loads(file.read(end - start)))

    @functools.cached_property
    def unigram_counts(self) -> np.ndarray:
        """int64 [vocab]: occurrences of each token in the train split."""
        return np.load(self.path / layout.UNIGRAM_COUNTS)

    @functools.cached_property
    def sha256(self) -> str:
        """Of info.json: what was prepared and how, wherever it lies now."""
        return hashlib.sha256((self.path / layout.INFO).read_bytes()).hexdigest()

    @functools.cached_property
    def tokenizer(self) -> tokenizer_lib.Tokenizer:
        """The tokenizer that made the data."""
        return tokenizer_lib.load(self.path / layout.TOKENIZER)

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """int32 [vocab]: UTF-8 bytes of text per token, for bits per byte of any positions."""
        return self.tokenizer.token_bytes


def open(path, *, tokenizer=None, sequence_length=None) -> PreparedData:
    """Opens prepared data, and checks that it is complete and what the caller expects.

    Args:
      tokenizer: path of a tokenizer.json that the data must have been made with.
      sequence_length: that its windows must have.
    Raises:
      FileNotFoundError, ValueError: it is not prepared data, damaged, or other data than expected.
    """
    info = layout.read_info(path)
    if tokenizer is not None:
        named = tokenizer_lib.load(tokenizer)
        if named.sha256 != info.tokenizer_sha256:
            raise ValueError(
                f"{path}: made with another tokenizer (sha256 {info.tokenizer_sha256}) than "
                f"the one named, {tokenizer} (sha256 {named.sha256}); run prepare_data with it"
            )
    if sequence_length is not None and sequence_length != info.sequence_length:
        raise ValueError(
            f"{path}: windows of {info.sequence_length} tokens; config.data.sequence_length "
            f"is {sequence_length}; set it to that, or run prepare_data again"
        )
    return PreparedData(path, info)


class Batches:
    """The batches of a run. Stateless: `batch(step)` is a function of the arguments.

    Args:
      rows: slice of the global batch that this process reads; None: all of it.
      start_step: number of batches by which the run's data order is shifted: `batch(0)` is that of
        step `start_step`.
      workers: processes that read ahead in `iterate`; 0 reads ahead on threads.
      mask_repetitive_windows: see `repetitive`.
    """

    def __init__(
        self,
        data,
        *,
        batch_size,
        seed,
        start_step=0,
        rows=None,
        workers=0,
        mask_repetitive_windows=False,
    ):
        num_windows = data.num_windows("train")
        if not num_windows:
            raise ValueError(f"{data.path}: the train split holds no window")
        self.data, self.batch_size, self.workers = data, batch_size, workers
        self._rows = range(batch_size)[rows if rows is not None else slice(None)]
        self._start_step, self._mask = start_step, mask_repetitive_windows
        # shuffle before repeat: grain then shuffles every epoch anew, from seed and epoch
        self._order = grain.MapDataset.range(num_windows).seed(seed).shuffle().repeat()

    def indices(self, step) -> list[int]:
        """Indices into the train split of this process's rows of a step."""
        first = (step + self._start_step) * self.batch_size
        return [int(self._order[first + row]) for row in self._rows]

    def batch(self, step) -> dict[str, np.ndarray]:
        """This process's rows of the batch of step number `step` (from 0)."""
        windows = self.data.read_windows("train", self.indices(step))
        return as_batch(windows, mask_repetitive=self._mask)

    def iterate(self, first_step):
        """Yields batch(first_step), batch(first_step + 1), … without end, reading ahead."""
        steps = grain.MapDataset.source(_Steps(self, first_step))
        if self.workers:
            options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
            multiprocessing = grain.MultiprocessingOptions(
                num_workers=self.workers, per_worker_buffer_size=READ_AHEAD
            )
            iterator = iter(steps.to_iter_dataset(options).mp_prefetch(multiprocessing))
        else:
            options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=READ_AHEAD)
            iterator = iter(steps.to_iter_dataset(options))
        try:
            yield from iterator
        finally:
            if close := getattr(iterator, "close", None):
                close()


class _Steps:
    """The batches from a step on, as a grain data source."""

    def __init__(self, batches, first_step):
        self._batches, self._first_step = batches, first_step

    def __len__(self):
        return 2**40

    def __getitem__(self, index):
        return self._batches.batch(self._first_step + int(index))


def as_batch(windows, *, mask_repetitive=False) -> dict[str, np.ndarray]:
    """Adds to windows the masks that training needs: token_mask, loss_mask, bool [rows, length]."""
    token_mask = windows["documents"] != layout.PADDING_DOCUMENT
    loss_mask = token_mask.copy()
    if mask_repetitive:
        loss_mask &= ~repetitive(windows["tokens"], token_mask)[:, None]
    return {**windows, "token_mask": token_mask, "loss_mask": loss_mask}


def repetitive(tokens, token_mask, *, max_ngram=MAX_NGRAM, max_repeats=MAX_REPEATS) -> np.ndarray:
    """bool [rows]: some n-gram of 1..max_ngram tokens occurs max_repeats times or more in a row.

    Such a stretch of n · r tokens equals itself shifted by n over n · (r - 1) positions.
    Source: the instance filter of the code that trained OLMoE, with its defaults.
    """
    found = np.zeros(len(tokens), bool)
    length = tokens.shape[1]
    for n in range(1, max_ngram + 1):
        needed = n * (max_repeats - 1)
        if needed > length - n:
            break
        equal = (tokens[:, n:] == tokens[:, :-n]) & token_mask[:, n:]
        runs = np.cumsum(np.pad(equal, ((0, 0), (1, 0))), axis=1, dtype=np.int32)
        found |= ((runs[:, needed:] - runs[:, :-needed]) == needed).any(axis=1)
    return found


def validation_batches(data, *, num_windows, batch_size) -> list[dict[str, np.ndarray]]:
    """Batches of fixed windows of the validation split: the same for the same arguments.

    Args:
      num_windows: windows evaluated, spread evenly over the split; 0, or more than there are, takes
        all.
      batch_size: rows of each batch; the last is filled up with rows that are all padding.
    """
    available = data.num_windows("validation")
    if not available:
        raise ValueError(
            f"{data.path}: the validation split is empty; "
            "run prepare_data with a larger --validation_fraction"
        )
    count = min(num_windows or available, available)
    indices = np.arange(count) * available // count
    batches = []
    for first in range(0, count, batch_size):
        windows = data.read_windows("validation", indices[first : first + batch_size])
        missing = batch_size - len(windows["tokens"])
        padding = {"tokens": 0, "documents": layout.PADDING_DOCUMENT, "domains": 0}
        for name, value in padding.items():
            rows = ((0, missing), (0, 0))
            windows[name] = np.pad(windows[name], rows, constant_values=value)
        batches.append(as_batch(windows))
    return batches


def ensure_embedded(
    directory, *, sequence_length, vocab_size, tokenizer=None, announce=None
) -> pathlib.Path:
    """Prepares the embedded corpus below `directory` unless that is done; returns its path.

    Data that exists is taken as it is, also if packages have been installed since: a run that
    resumes must see the data that it began with.

    Args:
      vocab_size: of the tokenizer that is trained, unless `tokenizer` names a file.
    """
    made_with = tokenizer_lib.load(tokenizer).sha256[:12] if tokenizer else f"vocab{vocab_size}"
    directory = pathlib.Path(os.path.expanduser(directory))
    path = directory / f"embedded-{made_with}-length{sequence_length}"
    if (path / layout.INFO).exists():
        layout.read_info(path)
        return path
    arguments = {"announce": announce} if announce else {}
    preparation.prepare(
        [preparation.EMBEDDED],
        path,
        sequence_length=sequence_length,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        validation_fraction=EMBEDDED_VALIDATION_FRACTION,
        **arguments,
    )
    return path
