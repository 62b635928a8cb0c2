"""`data`: tokens/s that the data pipeline reads, beside those that a train step consumes.

The embedded corpus is prepared as `experiments.prepare_data` does it and read as the training loop
reads it (`pipeline.Batches.iterate`: shuffled, decoded, masked, ahead on threads), in turn with
train steps of two models: work A, and the demo's, whose small step consumes far more. For each,
windows are read at its length and batch, with and without the search for repetitive windows that
the reference recipe asks for. The data lies in memory: it is small, and read before.
"""

import contextlib
import os
import tempfile
import time

import jax
import numpy as np

from olmoe_jax import machine
from olmoe_jax.benchmarking import rounds as rounds_lib
from olmoe_jax.benchmarking import tables, work
from olmoe_jax.data import layout, pipeline

VOCABULARY = 4096
DEMO = {
    "vocab_size": VOCABULARY, "max_length": 256, "d_model": 128, "num_heads": 2, "num_kv_heads": 2,
    "d_ff": 128, "num_experts": 16, "num_experts_per_token": 2,
}  # fmt: skip
CONSUMERS = {"work_a": {}, "demo": DEMO}  # changes of work A
TITLES = {"work_a": "work A", "demo": "demo model"}
SECONDS = 0.5  # of one sample of a pipeline
STEP, PIPELINE, FILTERED = "step", "pipeline", "pipeline, filtered"


def run(options):
    """The suite; (what --json gets, whether the batches are those of their steps)."""
    os.makedirs(options.scratch, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="data_", dir=options.scratch) as folder,
        contextlib.ExitStack() as stack,
    ):
        contestants, readers, tokens, tokenizer = {}, [], {}, None
        for name, changes in CONSUMERS.items():
            config = work.config(
                dtype=options.dtype, expert_backend=options.expert_backend or "auto", **changes
            )
            tokens[name] = config.tokens_per_step
            contestants[name, STEP] = _Steps(config).sample
            data = _prepared(folder, config.data.sequence_length, tokenizer)
            tokenizer = data.path / layout.TOKENIZER  # training it once is enough
            for kind, filtered in ((PIPELINE, False), (FILTERED, True)):
                batches = pipeline.Batches(
                    data, batch_size=config.training.batch_size, seed=0,
                    mask_repetitive_windows=filtered,
                )  # fmt: skip
                readers.append(stack.enter_context(contextlib.closing(Reader(batches, SECONDS))))
                contestants[name, kind] = readers[-1].sample
        for contest in contestants.values():
            contest()
        found = rounds_lib.compare(
            {", ".join(key): contest for key, contest in contestants.items()},
            rounds=options.rounds,
        )
        in_order = all(reader.in_order() for reader in readers)
    result = {"suite": "data", "batches_in_order": in_order, **_figures(found, tokens)}
    _show(result)
    return result, in_order


def _prepared(folder, length, tokenizer):
    print(f"preparing the embedded corpus in windows of {length:,} tokens", flush=True)
    path = pipeline.ensure_embedded(
        folder, sequence_length=length, vocab_size=VOCABULARY, tokenizer=tokenizer,
        announce=lambda line: None,
    )  # fmt: skip
    return pipeline.open(path)


class _Steps:
    """Train steps of a config, with one batch."""

    def __init__(self, config):
        self._trainer = work.Trainer(config)
        self._batch = work.batch(work.tokens(config, 1)[0])

    def sample(self):
        begun = time.perf_counter()
        self._trainer.step(self._batch)
        jax.block_until_ready(self._trainer.state)
        return rounds_lib.Sample(time.perf_counter() - begun)


class Reader:
    """Reads batches on and on, as the training loop does.

    Args:
      batches: pipeline.Batches.
      seconds: of one sample.
    """

    def __init__(self, batches, seconds):
        self._batches, self._seconds = batches, seconds
        self._iterator, self._read, self._last = batches.iterate(0), 0, None

    def sample(self):
        """Seconds per batch. What was read ahead before this sample does not count."""
        for _ in range(2 * pipeline.READ_AHEAD):
            self._next()
        first, begun = self._read, time.perf_counter()
        while time.perf_counter() - begun < self._seconds:
            self._next()
        return rounds_lib.Sample((time.perf_counter() - begun) / (self._read - first))

    def in_order(self) -> bool:
        """Whether the batch read last is the one of its step."""
        expected = self._batches.batch(self._read - 1)
        return all(np.array_equal(self._last[name], expected[name]) for name in expected)

    def close(self):
        """Ends the threads that read ahead."""
        self._iterator.close()

    def _next(self):
        self._last = next(self._iterator)
        self._read += 1


def _figures(found, tokens):
    """Contestants and ratios of Rounds; `tokens`: of a batch, by consumer."""
    rows, ratios = {}, {}
    for name, per_batch in tokens.items():
        for kind in (STEP, PIPELINE, FILTERED):
            seconds = found.summary(f"{name}, {kind}")
            rows[f"{name}, {kind}"] = {
                "seconds": seconds, "tokens_per_second": per_batch / seconds.median
            }  # fmt: skip
        for kind, key in ((PIPELINE, name), (FILTERED, f"{name}_filtered")):
            ratios[key] = found.speed(f"{name}, {kind}", against=f"{name}, {STEP}")
    return {
        **{f"ratio_{key}": ratio.median for key, ratio in ratios.items()},
        "speeds": ratios,
        "contestants": rows,
        **found.account(),
        "environment": machine.environment(),
    }


def _show(result):
    rows = [("", "ms per batch", "tokens/s", "× the step's")]
    for name, row in result["contestants"].items():
        consumer, kind = name.split(", ", 1)
        key = {STEP: None, PIPELINE: consumer, FILTERED: f"{consumer}_filtered"}[kind]
        seconds = row["seconds"]
        milliseconds = rounds_lib.Summary(*(1e3 * x for x in (seconds.median, seconds.low,
                                                              seconds.high)))  # fmt: skip
        speed = "1" if key is None else result["speeds"][key].text(0)
        title = f"{TITLES[consumer]}, {kind}"
        rows.append((title, milliseconds.text(), f"{row['tokens_per_second']:,.0f}", speed))
    print(f"\ndata: median (lowest–highest); filtered: repetitive windows masked\n"
          f"{tables.table(rows)}")  # fmt: skip
    if not result["batches_in_order"]:
        print("WRONG: a batch that was read ahead is not the one of its step")
    print(tables.footer(result))
