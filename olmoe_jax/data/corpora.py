"""Documents out of files: Dolma-format JSON lines (plain, .gz, .zst) and plain text, as a stream.

A corpus is read in *slices*: a few megabytes of whole records that can be handed to another
process, hashed and tokenised on their own. What a slice holds depends only on the file, never on
who reads it.

Dolma format: one JSON object per line with `text`, and if present `id`, `source` (which names the
domain) and `metadata`; a `domain` field, where there is one, names the domain instead. A text file
is one domain, named by its stem, and is cut into documents at a line `<|endoftext|>`, at the first
blank line after DOCUMENT_BYTES, or at the first line end after twice that.
"""

import dataclasses
import glob
import gzip
import hashlib
import io
import json
import os
import zlib

SLICE_BYTES = 4 << 20
DOCUMENT_BYTES = 8 << 10
READ_BYTES = 256 << 10
LONGEST_LINE = 1 << 30
ON_ERROR = ("stop", "skip")
DOLMA_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".json.gz", ".json.zst")
TEXT_SUFFIXES = (".txt", ".text")
SEPARATOR = b"<|endoftext|>"


@dataclasses.dataclass(frozen=True)
class Document:
    """One text with where it comes from; `domain` is what results are reported by."""

    id: str
    text: str
    source: str
    domain: str


@dataclasses.dataclass(frozen=True)
class Slice:
    """Consecutive whole records of one file.

    Attributes:
      kind: "dolma" or "text".
      name: the file, as errors and ids name it.
      first_line: line number (from 1) of the first record.
      payload: the records' bytes.
      ends: for text, where each document ends in `payload`; None for dolma, whose records are
        lines.
    """

    kind: str
    name: str
    first_line: int
    payload: bytes
    ends: tuple[int, ...] | None = None

    def sha256(self) -> str:
        """Hash of everything that decides which documents the slice yields."""
        digest = hashlib.sha256(repr((self.kind, self.name, self.first_line, self.ends)).encode())
        digest.update(self.payload)
        return digest.hexdigest()


NOTHING = Slice("dolma", "nothing", 1, b"")


class Problems:
    """Bad records: "stop" raises the first; "skip" counts them and keeps the first few messages."""

    KEPT = 5

    def __init__(self, on_error="stop"):
        if on_error not in ON_ERROR:
            raise ValueError(f"--on_error={on_error}: must be one of {', '.join(ON_ERROR)}")
        self.on_error, self.count, self.messages = on_error, 0, []

    def report(self, message):
        """Raises ValueError(message), or counts it."""
        if self.on_error == "stop":
            raise ValueError(f"{message}; pass --on_error=skip to drop such records")
        self.count += 1
        if len(self.messages) < self.KEPT:
            self.messages.append(message)

    def merge(self, count, messages):
        """Adds what another process counted."""
        self.count += count
        self.messages = (self.messages + list(messages))[: self.KEPT]


def expand(patterns) -> list[str]:
    """Paths that match any of the globs, sorted, each once.

    Raises:
      FileNotFoundError: a pattern matches no file.
      ValueError: a file's kind is not known by its suffix.
    """
    paths = set()
    for pattern in patterns:
        found = [
            p for p in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(p)
        ]
        if not found and os.path.isdir(os.path.expanduser(pattern)):
            raise FileNotFoundError(
                f"--input={pattern}: is a directory; name its files: --input='{pattern}/**/*.txt'"
            )
        if not found:
            raise FileNotFoundError(f"--input={pattern}: no file matches")
        paths.update(found)
    for path in sorted(paths):
        if not path.endswith(DOLMA_SUFFIXES + TEXT_SUFFIXES):
            known = " ".join(DOLMA_SUFFIXES + TEXT_SUFFIXES)
            raise ValueError(f"{path}: unknown kind of corpus file; expected one of {known}")
    return sorted(paths)


def slices(path, problems, *, name=None, slice_bytes=SLICE_BYTES):
    """Yields the `Slice`s of one file in order, with memory for about one of them.

    Args:
      name: what errors and ids call the file; default: its name without directories.
    Raises:
      ValueError: the file is damaged or cut short (under `problems.on_error == "stop"`).
    """
    lines = _line_blocks(path, problems, slice_bytes)
    name = name or os.path.basename(path)
    if path.endswith(TEXT_SUFFIXES):
        yield from _text_slices(name, lines, slice_bytes)
    else:
        for first_line, block in lines:
            yield Slice("dolma", name, first_line, block)


def slices_of(documents, name="embedded", slice_bytes=SLICE_BYTES):
    """Yields `Slice`s that hold the given documents: any source is then tokenised in one way."""
    lines, size, first_line, number = [], 0, 1, 0
    for number, document in enumerate(documents, 1):
        lines.append(json.dumps(dataclasses.asdict(document), ensure_ascii=False).encode() + b"\n")
        size += len(lines[-1])
        if size >= slice_bytes:
            yield Slice("dolma", name, first_line, b"".join(lines))
            lines, size, first_line = [], 0, number + 1
    if lines:
        yield Slice("dolma", name, first_line, b"".join(lines))


def documents(piece: Slice, problems):
    """Yields the non-empty `Document`s of a slice; bad records go to `problems`."""
    if piece.kind == "text":
        yield from _text_documents(piece, problems)
        return
    for number, line in enumerate(piece.payload.split(b"\n"), piece.first_line):
        if line.strip():
            document = _dolma_document(
                line, f"{piece.name}, line {number}", number, piece.name, problems
            )
            if document is not None and document.text:
                yield document


def _dolma_document(line, where, number, name, problems):
    """One JSON line as a Document, or None after reporting what is wrong with it."""
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        return problems.report(f"{where}: not UTF-8 ({error.reason} at byte {error.start})")
    except (ValueError, RecursionError) as error:
        return problems.report(f"{where}: not a JSON object ({error}): malformed or cut short")
    if not isinstance(record, dict):
        return problems.report(
            f'{where}: a JSON {type(record).__name__}, expected an object with a field "text"'
        )
    if "text" not in record:
        return problems.report(f'{where}: no field "text"')
    if not isinstance(record["text"], str):
        return problems.report(
            f'{where}: field "text" is a {type(record["text"]).__name__}, expected a string'
        )
    try:
        record["text"].encode()
    except UnicodeEncodeError:
        return problems.report(
            f'{where}: field "text" holds half of a surrogate pair, which is no character'
        )
    stem = _stem(name)
    source = str(record.get("source") or os.path.basename(stem))
    return Document(
        id=str(record.get("id") or f"{stem}:{number}"),
        text=record["text"],
        source=source,
        domain=str(record.get("domain") or source),
    )


def _stem(name):
    for suffix in sorted(DOLMA_SUFFIXES + TEXT_SUFFIXES, key=len, reverse=True):
        if name.endswith(suffix):
            return name[: -len(suffix)]
    return name


def _text_documents(piece, problems):
    stem, start, line = _stem(piece.name), 0, piece.first_line
    for end in piece.ends:
        record = piece.payload[start:end]
        start, number = end, line
        line += record.count(b"\n")
        try:
            text = record.decode()
        except UnicodeDecodeError as error:
            bad_line = number + record[: error.start].count(b"\n")
            problems.report(f"{piece.name}, line {bad_line}: not UTF-8 ({error.reason})")
            continue
        lines = text.splitlines(keepends=True)
        if lines and lines[-1].strip() == SEPARATOR.decode():
            text = "".join(lines[:-1])
        if text.strip():
            yield Document(f"{stem}:{number}", text, piece.name, os.path.basename(stem))


def _text_slices(name, blocks, slice_bytes):
    """Slices that end where a document ends, wherever the blocks happen to be cut."""
    payload, ends, start, first_line, line_number, size = [], [], 0, 1, 0, 0
    for _, block in blocks:
        for line in io.BytesIO(block):
            payload.append(line)
            size += len(line)
            line_number += 1
            length, content = size - start, line.strip()
            blank = not content
            if (
                content == SEPARATOR
                or (blank and length >= DOCUMENT_BYTES)
                or length >= 2 * DOCUMENT_BYTES
            ):
                ends.append(size)
                start = size
                if size >= slice_bytes:
                    yield Slice("text", name, first_line, b"".join(payload), tuple(ends))
                    payload, ends, start, size, first_line = [], [], 0, 0, line_number + 1
    if size > start:
        ends.append(size)
    if payload:
        yield Slice("text", name, first_line, b"".join(payload), tuple(ends))


def _line_blocks(path, problems, block_bytes):
    """Yields (line number of the first line, block of whole lines of about block_bytes)."""
    rest, size, line, wanted = [], 0, 1, block_bytes
    try:
        for chunk in _chunks(path):
            rest.append(chunk)
            size += len(chunk)
            if size < wanted:
                continue
            data = b"".join(rest)
            cut = data.rfind(b"\n") + 1
            if not cut and size > LONGEST_LINE:
                raise ValueError(f"a line is longer than {LONGEST_LINE} bytes")
            if cut:
                yield line, data[:cut]
                line += data.count(b"\n", 0, cut)
            # doubling keeps a long line from being joined too often
            wanted = block_bytes if cut else 2 * size
            rest, size = [data[cut:]], size - cut
    except (EOFError, zlib.error, gzip.BadGzipFile, ValueError) as error:
        data = b"".join(rest)
        last = line - 1 + data.count(b"\n")
        problems.report(f"{path}: damaged or cut short after line {last} ({error})")
        rest = [data[: data.rfind(b"\n") + 1]]
    if data := b"".join(rest):
        yield line, data


def _chunks(path):
    """Decompressed bytes of a file, chunk by chunk; raises if a compressed stream has no end."""
    if path.endswith(".zst"):
        yield from _zstandard_chunks(path)
        return
    with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
        while chunk := file.read1(READ_BYTES):  # read() would lose what precedes a truncation
            yield chunk


def _zstandard_chunks(path):
    """As `_chunks`, for .zst: zstandard's stream reader ends a truncated file without an error."""
    import zstandard  # only for .zst files

    with open(path, "rb") as file:
        decompressor, begun = None, False
        while chunk := file.read(READ_BYTES):
            while chunk:
                if decompressor is None or decompressor.eof:
                    decompressor = zstandard.ZstdDecompressor().decompressobj()
                begun = True
                try:
                    data = decompressor.decompress(chunk)
                except zstandard.ZstdError as error:
                    raise ValueError(str(error)) from error
                if data:
                    yield data
                chunk = decompressor.unused_data if decompressor.eof else b""
        if begun and not decompressor.eof:
            raise EOFError("compressed stream ended before its end marker")
