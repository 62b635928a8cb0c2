"""Byte-level BPE: trained on documents, or read from a tokenizer.json of the tokenizers library."""

import dataclasses
import functools
import hashlib
import os
import pathlib

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

END_OF_DOCUMENT = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")
PADDING = "<|padding|>"
MIN_VOCAB_SIZE = 256 + 2  # every byte, padding, end of document


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A tokenizer and what the rest needs to know of it.

    Attributes:
      json: the bytes of its tokenizer.json; equality and pickling go by them.
      name: where it came from, for errors.
    """

    json: bytes = dataclasses.field(repr=False)
    name: str = dataclasses.field(default="tokenizer.json", compare=False)

    @functools.cached_property
    def _backend(self):
        try:
            backend = tokenizers.Tokenizer.from_buffer(self.json)
        except Exception as error:  # the library raises plain Exception or ValueError
            raise ValueError(
                f"{self.name}: not a tokenizer.json of the tokenizers library ({error})"
            ) from None
        backend.no_truncation()
        backend.no_padding()
        # a document that spells "<|endoftext|>" does not end there
        backend.encode_special_tokens = True
        return backend

    def __getstate__(self):
        return {"json": self.json, "name": self.name}

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of tokenizer.json's bytes."""
        return hashlib.sha256(self.json).hexdigest()

    @functools.cached_property
    def vocab_size(self) -> int:
        """Largest token id + 1, added tokens included."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def end_of_document(self) -> int:
        """Id of the token that is appended to every document."""
        for token in END_OF_DOCUMENT:
            if (index := self._backend.token_to_id(token)) is not None:
                return index
        raise ValueError(
            f"{self.name}: no end-of-document token; expected one of {' '.join(END_OF_DOCUMENT)}"
        )

    def encode_batch(self, texts) -> list[np.ndarray]:
        """Token ids of each text, uint32, without any special token."""
        encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(e.ids, np.uint32) for e in encoded]

    def encode_prompt(self, text) -> list[int]:
        """Token ids of a text to be continued, as transformers makes them: with the tokens that the
        tokenizer itself adds (Llama's `<s>`) and the special tokens that the text spells out."""
        self._backend  # noqa: B018  checks the file; in it special tokens are ordinary text
        backend = tokenizers.Tokenizer.from_buffer(self.json)
        backend.no_truncation()
        backend.no_padding()
        return backend.encode(text).ids

    def decode(self, ids) -> str:
        """Text of token ids, special tokens spelt out."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """int32 [vocab]: UTF-8 bytes of text that each token stands for; special tokens 0.

        Exact for byte-level vocabularies (whatever the cut through a character); elsewhere "▁"
        counts as the space and "<0x0A>" as the byte that they stand for.
        """
        out = np.zeros(self.vocab_size, np.int32)
        byte_level = set(pre_tokenizers.ByteLevel.alphabet())
        added = self._backend.get_added_tokens_decoder()
        for token, index in self._backend.get_vocab(with_added_tokens=True).items():
            if index in added:
                out[index] = 0 if added[index].special else len(added[index].content.encode())
            elif set(token) <= byte_level:
                out[index] = len(token)
            elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                out[index] = 1
            else:
                out[index] = len(token.replace("▁", " ").encode())
        return out


def load(path) -> Tokenizer:
    """Reads a tokenizer.json (or the one in a directory).

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not a tokenizer, or has no end-of-document token.
    """
    path = pathlib.Path(os.path.expanduser(path))
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"tokenizer {path}: no such file; expected a tokenizer.json")
    tokenizer = Tokenizer(path.read_bytes(), str(path))
    tokenizer.end_of_document  # noqa: B018  checks both the file and the token
    return tokenizer


def train(texts, *, vocab_size) -> Tokenizer:
    """Byte-level BPE of exactly `vocab_size` tokens (fewer if the texts hold too few pairs).

    The same for the same texts in the same order. Ids 0 and 1 are `<|padding|>` and
    `<|endoftext|>`.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size is {vocab_size}: must be at least {MIN_VOCAB_SIZE} "
            "(256 bytes and 2 special tokens)"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PADDING, END_OF_DOCUMENT[0]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend.to_str(pretty=True).encode(), "trained tokenizer")
