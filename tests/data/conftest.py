"""A small Dolma corpus of three sources, and the data prepared from it."""

import dataclasses
import json
import pathlib
import random

import pytest

from olmoe_jax.data import pipeline, preparation
from olmoe_jax.data import tokenizer as tokenizer_lib

LENGTH = 23
SOURCES = ("wiki", "code", "books")
LONG_DOCUMENT = 7  # spans several windows


def make_records(count, seed):
    """Dolma records of random words: three sources, document LONG_DOCUMENT much longer."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefgh é\n", k=rng.randint(1, 7))) for _ in range(211)]
    records = []
    for number in range(count):
        size = 5 * LENGTH if number == LONG_DOCUMENT else rng.randint(3, 37)
        text = " ".join(rng.choices(words, k=size))
        source = SOURCES[number % 3]
        records.append({"id": f"{source}-{number}", "text": text, "source": source, "metadata": {}})
    return records


def write_records(path, records):
    """Writes a .jsonl file."""
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What the fixture made, and from what."""

    corpus: pathlib.Path
    records: list
    tokenizer_file: pathlib.Path
    tokenizer: tokenizer_lib.Tokenizer
    result: preparation.Result

    @property
    def path(self):
        return self.result.path

    @property
    def data(self):
        return pipeline.open(self.path)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """131 documents of three sources in windows of 23 tokens."""
    directory = tmp_path_factory.mktemp("prepared")
    records = make_records(131, seed=3)
    corpus, file = directory / "part-00.jsonl", directory / "bpe.json"
    write_records(corpus, records)
    tokenizer = tokenizer_lib.train([r["text"] for r in records], vocab_size=307)
    file.write_bytes(tokenizer.json)
    result = preparation.prepare(
        [str(corpus)],
        directory / "out",
        sequence_length=LENGTH,
        tokenizer=str(file),
        validation_fraction=0.1,
        announce=lambda line: None,
    )
    return Prepared(corpus, records, file, tokenizer, result)
