"""Dolma-format JSON lines or plain text → tokenised windows that `experiments.train` reads.

    python -m experiments.prepare_data --input='corpus/*.jsonl.gz' --tokenizer=tokenizer.json \\
        --output=DIR --sequence_length=4096

`--input` may be given several times or as a comma-separated list; "embedded" stands for the corpus
that every installation can build. Without `--tokenizer` one is trained. If the command is killed,
run it again: it goes on from what has been tokenised. Train with `--config.data.path=DIR`.
"""

import os

from absl import flags

from experiments import app
from olmoe_jax.data import corpora, preparation

_INPUT = flags.DEFINE_multi_string(
    "input", None, "Glob of .jsonl[.gz|.zst] or .txt files, or 'embedded'; repeat, or use commas."
)
_OUTPUT = flags.DEFINE_string("output", None, "Directory to create.")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "tokenizer.json; without it one is trained.")
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 4096, "Tokens of a tokenizer that is trained.")
_LENGTH = flags.DEFINE_integer("sequence_length", None, "Tokens per window.")
_FRACTION = flags.DEFINE_float(
    "validation_fraction", 0.01, "Share of each domain's documents that is held out."
)
_ON_ERROR = flags.DEFINE_enum(
    "on_error", "stop", corpora.ON_ERROR, "At a bad record: stop, or skip and count."
)
_WORKERS = flags.DEFINE_integer("workers", None, "Tokenising processes; default: one per core.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the split into train and validation.")

SMALL_BYTES = 64 << 20  # below it, starting processes costs more than they save


def main(argv):
    """Prepares the data and prints what it holds."""
    del argv
    for flag in (_INPUT, _OUTPUT, _LENGTH):
        if flag.value in (None, []):
            raise ValueError(f"--{flag.name} is required")
    inputs = [part for value in _INPUT.value for part in value.split(",") if part]
    result = preparation.prepare(
        inputs,
        _OUTPUT.value,
        sequence_length=_LENGTH.value,
        tokenizer=_TOKENIZER.value,
        vocab_size=_VOCAB_SIZE.value,
        validation_fraction=_FRACTION.value,
        on_error=_ON_ERROR.value,
        workers=_default_workers(inputs) if _WORKERS.value is None else _WORKERS.value,
        seed=_SEED.value,
        announce=lambda line: print(line, flush=True),
    )
    _show(result)
    app.write_json(
        {
            "path": str(result.path),
            "seconds": result.seconds,
            "pieces_tokenised": result.pieces_tokenised,
            "pieces_reused": result.pieces_reused,
            "skipped_records": result.info.skipped_records,
            "info": result.info,
        }
    )


def _default_workers(inputs):
    paths = corpora.expand([i for i in inputs if i != preparation.EMBEDDED])
    small = sum(map(os.path.getsize, paths)) < SMALL_BYTES
    return 0 if small else os.cpu_count()


def _show(result):
    info = result.info
    print(f"{'split':<12}{'domain':<24}{'tokens':>16}{'text bytes':>16}")
    for split, numbers in info.splits.items():
        for domain, tokens in numbers.domain_tokens.items():
            size = numbers.domain_text_bytes[domain]
            print(f"{split:<12}{domain[:23]:<24}{tokens:>16,}{size:>16,}")
    held = info.splits["validation"]
    for domain in info.domains:
        if held.windows and domain not in held.domain_tokens:
            print(f"note: {domain} has no validation: too few documents to hold one out")
    for message in result.messages:
        print(f"skipped: {message}")
    if info.skipped_records:
        print(f"skipped {info.skipped_records:,} bad records in all")
    if result.pieces_reused:
        reused, every = result.pieces_reused, result.pieces_reused + result.pieces_tokenised
        print(f"reused {reused} of {every} tokenised pieces of an earlier run")
    windows = " and ".join(f"{s.windows:,} {name}" for name, s in info.splits.items())
    print(
        f"{result.path}: {info.num_documents:,} documents, {windows} windows of "
        f"{info.sequence_length} tokens, in {result.seconds:.1f} s"
    )


if __name__ == "__main__":
    app.run(main, flags_with_json=True)
