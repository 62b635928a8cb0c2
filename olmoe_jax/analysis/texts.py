"""The texts that routing is recorded on: a stream of tokens per domain, cut into windows.

The protocol is that of the scripts released with OLMoE (`run_moe_analysis.py`,
`run_routing_analysis.py`): the documents of a domain one behind the other, no token put between
them, cut every `context_length` tokens; a token sees what precedes it in its window, other
documents included (unless the model was trained with `data.mask_documents`). Prepared data hold an
end-of-document token behind each document; it is part of the stream, as it was in training.
Differing from the scripts, the last window may be shorter than the others, and the true next token
of a window's last token is that of the next window. Where the document ends there is none.
"""

import dataclasses
import functools
import glob
import hashlib
import json
import os
import pathlib

import numpy as np

from olmoe_jax.data import corpora, layout, pipeline
from olmoe_jax.data import tokenizer as tokenizer_lib

CONTEXT_LENGTH = 2048  # of the released analyses
_WINDOWS_AT_ONCE = 64
_HASHED_AT_ONCE = 1 << 20  # tokens


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
    """The tokens of one domain.

    Attributes:
      domain: its name.
      tokens: int32 [tokens]; may be a memory map.
      documents: int32 [tokens], from 0 and never falling: the document's number in this text.
      context_length: tokens of a window.
      tokenizer: that made them, or None where it is not known.

    Raises:
      ValueError: there are no tokens, or the arrays do not fit each other.
    """

    domain: str
    tokens: np.ndarray
    documents: np.ndarray
    context_length: int = CONTEXT_LENGTH
    tokenizer: tokenizer_lib.Tokenizer | None = None

    def __post_init__(self):
        if not len(self.tokens):
            raise ValueError(f"domain {self.domain!r} is empty: it holds no token")
        for name in ("tokens", "documents"):
            array = getattr(self, name)
            if array.dtype != np.int32 or array.shape != (len(self.tokens),):
                raise ValueError(
                    f"domain {self.domain!r}: {name} are {array.dtype} {list(array.shape)}, "
                    f"expected int32 [{len(self.tokens)}]"
                )
        if self.context_length < 1:
            raise ValueError(f"context_length is {self.context_length}: must be at least 1")

    @property
    def num_windows(self) -> int:
        """The last may be shorter than the others."""
        return -(-len(self.tokens) // self.context_length)

    @property
    def num_documents(self) -> int:
        """Of which the last may be cut."""
        return int(self.documents[-1]) + 1

    @functools.cached_property
    def largest_id(self) -> int:
        """Of the tokens."""
        return max(int(part.max()) for part in _parts(self.tokens))

    @functools.cached_property
    def data(self) -> str:
        """SHA-256 of context length, tokens and documents: equal for equal texts only."""
        digest = hashlib.sha256(f"context_length={self.context_length}\n".encode())
        for array in (self.tokens, self.documents):
            for part in _parts(array):
                digest.update(np.ascontiguousarray(part, "<i4").tobytes())
        return digest.hexdigest()

    @functools.cached_property
    def cut_documents(self) -> int:
        """Documents longer than a window: their later tokens do not see their beginning."""
        counts = np.bincount(self.documents)
        return int((counts > self.context_length).sum())

    def windows(self, start, stop):
        """Windows start..stop: (int32 tokens, bool real), [windows, context_length]; behind the end
        of the text 0 and False."""
        length = self.context_length
        found = self.tokens[start * length : stop * length]
        tokens = np.zeros((stop - start) * length, np.int32)
        tokens[: len(found)] = found
        real = np.arange(len(tokens)) < len(found)
        return tokens.reshape(-1, length), real.reshape(-1, length)

    def next_ids(self, start, stop):
        """int32 [tokens]: what follows the tokens of windows start..stop in their document; -1
        where it ends."""
        first, length = start * self.context_length, self.context_length
        last = min(stop * length, len(self.tokens))
        tokens, documents = (a[first : last + 1] for a in (self.tokens, self.documents))
        out = np.full(last - first, -1, np.int32)
        same = documents[1:] == documents[:-1]
        out[: len(same)] = np.where(same, tokens[1:], -1)
        return out

    def remarks(self) -> tuple[str, ...]:
        """What a reader of the results should know."""
        if not self.cut_documents:
            return ()
        return (
            f"domain {self.domain}: {self.cut_documents:,} of {self.num_documents:,} documents are "
            f"longer than the context of {self.context_length:,} tokens and are cut into windows: "
            "a token sees its own window only",
        )


def from_prepared(
    data, *, context_length=CONTEXT_LENGTH, split="validation", domains=None, max_tokens=None,
    folder=None, announce=print,
) -> list[Text]:  # fmt: skip
    """A Text per domain of prepared data, in the order of the domains.

    Args:
      data: directory written by `experiments.prepare_data`, or the PreparedData.
      split: "validation" or "train".
      domains: names; None: all that have tokens in this split.
      max_tokens: of each domain, from its beginning; None: all.
      folder: where the streams are kept (8 bytes per token), for more than memory holds; None: in
        memory.
      announce: called with lines for a person.

    Raises:
      FileNotFoundError, ValueError: it is not prepared data, it has no such domain, or a domain
        that was named is empty in this split.
    """
    if not isinstance(data, pipeline.PreparedData):
        data = pipeline.open(data)
    if split not in layout.SPLITS:
        raise ValueError(f"split is {split!r}: must be one of {', '.join(layout.SPLITS)}")
    _check_limits(context_length, max_tokens)
    names, present = data.info.domains, data.info.splits[split].domain_tokens
    for name in domains or ():
        if name not in names:
            raise ValueError(f"{data.path}: no domain {name!r}; it has {', '.join(names)}")
        if not present.get(name):
            raise ValueError(
                f"{data.path}: domain {name!r} is empty in the split {split}; take another split, "
                "or prepare the data with a larger --validation_fraction"
            )
    wanted = domains or [name for name in names if present.get(name)]
    if not wanted:
        raise ValueError(f"{data.path}: the split {split} is empty")
    if empty := sorted(set(names) - set(wanted)) if domains is None else ():
        announce(f"note: empty in the split {split}, so left out: {', '.join(empty)}")
    streams = {name: _Stream(name, max_tokens, folder) for name in wanted}
    for first in range(0, data.num_windows(split), _WINDOWS_AT_ONCE):
        if all(stream.full for stream in streams.values()):
            break
        last = min(first + _WINDOWS_AT_ONCE, data.num_windows(split))
        rows = data.read_windows(split, range(first, last))
        real = rows["documents"] != layout.PADDING_DOCUMENT
        for name, stream in streams.items():
            mine = real & (rows["domains"] == names.index(name))
            stream.append(rows["tokens"][mine], rows["documents"][mine])
    return [s.text(context_length, data.tokenizer) for s in streams.values()]


def from_files(
    patterns, tokenizer, *, context_length=CONTEXT_LENGTH, max_tokens=None, folder=None,
    on_error="stop",
) -> list[Text]:  # fmt: skip
    """A Text per domain of plain text (a domain per file name) or Dolma-format JSON lines.

    Which pieces of a text file count as documents says `olmoe_jax.data.corpora`.

    Args:
      patterns: globs.
      tokenizer: Tokenizer, or the path of a tokenizer.json.
      max_tokens, folder: as of `from_prepared`.
      on_error: "stop" at a bad record, or "skip" it.

    Raises:
      FileNotFoundError: nothing matches. ValueError: a file is damaged or holds no text.
    """
    _check_limits(context_length, max_tokens)
    if not isinstance(tokenizer, tokenizer_lib.Tokenizer):
        tokenizer = tokenizer_lib.load(tokenizer)
    found = []
    for pattern in patterns:
        matches = glob.glob(os.path.expanduser(pattern), recursive=True)
        if not any(map(os.path.isfile, matches)):
            raise FileNotFoundError(f"{pattern}: no file matches")
        found += map(glob.escape, filter(os.path.isfile, matches))
    problems, streams = corpora.Problems(on_error), {}
    for path in corpora.expand(found):
        any_text = False
        for piece in corpora.slices(path, problems):
            groups = {}
            for document in corpora.documents(piece, problems):
                any_text = True
                name = document.domain
                streams.setdefault(name, _Stream(name, max_tokens, folder))
                groups.setdefault(name, []).append(document.text)
            for name, documents in groups.items():
                streams[name].encode(tokenizer, documents)
            if piece.kind == "text" and groups and all(streams[n].full for n in groups):
                break  # a text file is one domain
        if not any_text:
            raise ValueError(f"{path}: holds no text, its domain would be empty; leave it out")
    return [s.text(context_length, tokenizer) for _, s in sorted(streams.items())]


def same_tokens(a, b) -> bool:
    """Whether two Tokenizers mean the same by every id, in files that may be spelt differently."""
    if a.sha256 == b.sha256:
        return True
    parts = []
    for tokenizer in (a, b):
        content = json.loads(tokenizer.json)
        model = content.get("model") or {}
        added = {(t["id"], t["content"]) for t in content.get("added_tokens") or ()}
        vocab = model.get("vocab")
        pairs = vocab.items() if isinstance(vocab, dict) else enumerate(map(repr, vocab or ()))
        merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges") or ()]
        parts.append((set(pairs) | {(t, i) for i, t in added}, merges))
    return parts[0] == parts[1]


def _check_limits(context_length, max_tokens):
    if context_length < 1:
        raise ValueError(f"context_length is {context_length}: must be at least 1")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}: must be at least 1, or None")


class _Stream:
    """Tokens and documents of a domain as they come, in memory or in two files."""

    def __init__(self, domain, limit, folder):
        self._domain, self._limit, self._size = domain, limit, 0
        self._last, self._count = None, 0  # document: as the source numbers it, and as we do
        self._parts, self._files = ([], []), None
        if folder is not None:
            folder = pathlib.Path(folder)
            folder.mkdir(parents=True, exist_ok=True)
            name = hashlib.sha256(domain.encode()).hexdigest()[:16]
            paths = [folder / f"{name}.{kind}.int32" for kind in ("tokens", "documents")]
            self._files = [path.open("w+b") for path in paths]

    def __len__(self):
        return self._size

    @property
    def full(self):
        return self._limit is not None and self._size >= self._limit

    def encode(self, tokenizer, documents):
        """Appends texts, each a document."""
        if self.full:
            return
        encoded = [ids for ids in tokenizer.encode_batch(documents) if len(ids)]
        first = 0 if self._last is None else self._last + 1
        numbers = np.repeat(np.arange(first, first + len(encoded)), [len(i) for i in encoded])
        self.append(np.concatenate([np.empty(0, np.int32), *encoded]), numbers)

    def append(self, tokens, documents):
        """The next tokens, and the document of each as the source numbers them."""
        room = len(tokens) if self._limit is None else self._limit - self._size
        tokens, documents = tokens[:room].astype(np.int32), documents[:room]
        if not len(tokens):
            return
        begins = np.diff(documents, prepend=documents[0]) != 0
        begins[0] = self._last is not None and documents[0] != self._last
        numbers = (self._count + np.cumsum(begins)).astype(np.int32)
        self._last, self._count = int(documents[-1]), int(numbers[-1])
        self._size += len(tokens)
        for part, file, array in zip(
            self._parts, self._files or (None, None), (tokens, numbers), strict=True
        ):
            part.append(array) if file is None else file.write(array.tobytes())

    def text(self, context_length, tokenizer):
        if self._files is None or not self._size:
            empty = np.empty(0, np.int32)
            arrays = [np.concatenate([empty, *part]) for part in self._parts]
        else:
            arrays = []
            for file in self._files:
                file.close()
                arrays.append(np.memmap(file.name, np.int32, "r"))
        return Text(self._domain, *arrays, context_length, tokenizer)


def _parts(array):
    for start in range(0, len(array), _HASHED_AT_ONCE):
        yield array[start : start + _HASHED_AT_ONCE]
