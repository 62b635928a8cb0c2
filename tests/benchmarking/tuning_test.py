"""Choosing the peer's best variant, against a worker that answers from a table."""

import pytest

from olmoe_jax import machine
from olmoe_jax.benchmarking import tuning, work

TINY = work.config(
    d_model=8, num_heads=2, num_kv_heads=2, d_ff=5, num_experts=7, num_experts_per_token=3,
    max_length=11,
)  # fmt: skip


class Table:
    """A worker: {(experts, threads, compiled): seconds of its steps in order, or an error}."""

    def __init__(self, table):
        self._table, self.started = table, []

    def ask(self, *, do, **request):
        if do == "start":
            variant = request["experts"], request["threads"], request["compiled"]
            self.started.append(variant)
            self._left = self._table[variant]
            return {}
        assert do == "steps" and request == {"count": 1}
        if isinstance(self._left, str):
            return {"error": self._left}
        seconds, *self._left = self._left
        return {"seconds": seconds, "losses": [0.0]}


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 2)


def test_the_fastest_goes_on_and_what_is_hopeless_is_not_tried_further():
    worker = Table({
        ("grouped_mm", 2, False): [9, 4.0, 4.2, 3.9],
        ("grouped_mm", 2, True): [60, 3.7, 3.5, 3.6],
        ("grouped_mm", 1, False): [7.5],  # more than twice 3.5
        ("eager", 2, False): [6, 5.4],  # more than 1.5 × 3.5
        ("other", 2, False): "ImportError: no other",
    })  # fmt: skip
    best, tried = tuning.tune(worker, ["other", "eager", "grouped_mm"], TINY)
    assert best == tuning.Variant("grouped_mm", 2, True)
    assert worker.started == [
        ("grouped_mm", 2, False), ("grouped_mm", 2, True), ("grouped_mm", 1, False),
        ("eager", 2, False), ("other", 2, False),
    ]  # fmt: skip
    assert [one["seconds"] for one in tried] == [3.9, 3.5, 7.5, 5.4, None]
    assert tried[1] == {"variant": "grouped_mm, 2 threads, torch.compile", "seconds": 3.5,
                        "note": ""}  # fmt: skip
    assert tried[2]["note"] == "one step, not tried further"
    assert tried[4]["note"] == "transformers: ImportError: no other"


def test_one_that_cannot_be_compiled_is_still_tried_with_fewer_threads():
    worker = Table({
        ("grouped_mm", 2, False): [5, 5, 5, 5],
        ("grouped_mm", 2, True): "no compiler",
        ("grouped_mm", 1, False): [5, 4, 4, 4],
        ("grouped_mm", 1, True): [9, 9],
    })  # fmt: skip
    best, tried = tuning.tune(worker, ["grouped_mm"], TINY)
    assert best == tuning.Variant("grouped_mm", 1, False) and len(tried) == 4


def test_what_does_not_fit_in_memory_is_not_tried(monkeypatch):
    # batch · length · k · layers · 3 · d · f · bytes
    needed = 4 * 11 * 3 * 4 * 3 * 8 * 5 * 4
    worker = Table({
        ("batched_mm", threads, compiled): [1, 1, 1, 1]
        for threads in (1, 2) for compiled in (False, True)
    })  # fmt: skip
    monkeypatch.setattr(machine, "free_memory", lambda: needed + 1)
    best, _ = tuning.tune(worker, ["batched_mm"], TINY)
    assert best.experts == "batched_mm"
    worker.started.clear()
    monkeypatch.setattr(machine, "free_memory", lambda: needed)
    with pytest.raises(ValueError, match="no variant of the peer runs; batched_mm.*: needs 0 GB"):
        tuning.tune(worker, ["batched_mm"], TINY)
    assert worker.started == []


def test_a_line_shows_what_was_found():
    one = {"variant": "eager, 1 thread", "seconds": 1.234, "note": "n" * 200}
    line = tuning.line(one)
    assert line.split() == ["eager,", "1", "thread", "1.23", "s", "n" * 80]
    assert tuning.line(one | {"seconds": None, "note": ""}) == "eager, 1 thread"
