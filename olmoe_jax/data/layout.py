"""What a prepared directory holds, and the check that it is whole.

DIR/info.json           what it is (`Info`); written last: its presence says that the rest is there
DIR/tokenizer.json      the tokenizer
DIR/dataset/            the TFDS dataset: splits train and validation
DIR/documents.jsonl     one line per document; documents.offsets.bin says where each line begins
DIR/unigram_counts.npy  int64 [vocab]: how often each token occurs in train
"""

import dataclasses
import json
import os
import pathlib

FORMAT = 1
SPLITS = ("train", "validation")
PADDING_DOCUMENT = -1
INFO, TOKENIZER, DATASET = "info.json", "tokenizer.json", "dataset"
DOCUMENTS, OFFSETS, UNIGRAM_COUNTS = (
    "documents.jsonl",
    "documents.offsets.bin",
    "unigram_counts.npy",
)


@dataclasses.dataclass(frozen=True)
class SplitInfo:
    """One split in numbers.

    Attributes:
      tokens: with end-of-document tokens, without padding.
      text_bytes: UTF-8 bytes of the documents' text.
    """

    windows: int
    documents: int
    tokens: int
    text_bytes: int
    domain_tokens: dict[str, int]
    domain_text_bytes: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Info:
    """Contents of info.json.

    Attributes:
      domains: names, in the order of the numbers in a batch's `domains`.
      request: what was asked for; a directory is taken as done only for the same request.
      files: size in bytes of every other file.
    """

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
class DocumentRecord:
    """A row of the document table."""

    id: str
    source: str
    domain: str
    first_words: str
    split: str
    tokens: int
    text_bytes: int


def write_info(directory, **values) -> Info:
    """Writes info.json of a directory whose other files are all there; returns what it says."""
    directory = pathlib.Path(directory)
    paths = sorted(p for p in directory.rglob("*") if p.is_file())
    files = {p.relative_to(directory).as_posix(): p.stat().st_size for p in paths}
    info = Info(format=FORMAT, files=files, **values)
    (directory / INFO).write_text(json.dumps(dataclasses.asdict(info), indent=2) + "\n")
    return info


def read_info(path) -> Info:
    """Reads and checks info.json of a prepared directory.

    Raises:
      FileNotFoundError: no such directory, or it is not (completely) prepared data.
      ValueError: it was written in another format, or files are missing or cut short.
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such directory; make it with experiments.prepare_data")
    if not (path / INFO).is_file():
        raise FileNotFoundError(
            f"{path}: not prepared data, or not completely (no info.json); run prepare_data again"
        )
    try:
        values = json.loads((path / INFO).read_text())
        if values["format"] != FORMAT:
            raise ValueError(
                f"{path}: prepared data of format {values['format']}, this version reads {FORMAT}"
            )
        values["domains"] = tuple(values["domains"])
        values["splits"] = {k: SplitInfo(**v) for k, v in values["splits"].items()}
        info = Info(**values)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path / INFO}: damaged ({error!r}); run prepare_data again") from None
    for name, size in info.files.items():
        actual = os.path.getsize(path / name) if (path / name).exists() else None
        if actual != size:
            found = "is missing" if actual is None else f"has {actual} bytes instead of {size}"
            raise ValueError(
                f"{path}: {name} {found}; remove the directory and run prepare_data again"
            )
    return info
