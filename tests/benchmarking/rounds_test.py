"""Contestants in turn, disturbed rounds, ratios within rounds, commands and their failures."""

import contextlib
import sys

import pytest

from olmoe_jax.benchmarking import processes
from olmoe_jax.benchmarking import rounds as rounds_lib


def quiet(line):
    del line


@pytest.fixture
def loads(monkeypatch):
    """A list of foreign loads; `ForeignLoad` then hands out its first, removing it."""
    given = []

    class Given(contextlib.nullcontext):
        def __enter__(self):
            self.share = given.pop(0)
            return self

    monkeypatch.setattr(processes, "ForeignLoad", Given)
    return given


def contestants(log):
    """Two that count their runs; "slow" needs three times as long as "fast"."""

    def run(name, seconds):
        log.append(name)
        return rounds_lib.Sample(seconds * (1 + len(log)), {"run": len(log)})

    return {"slow": lambda: run("slow", 3.0), "fast": lambda: run("fast", 1.0)}


def compare(log, **changes):
    settings = {
        "rounds": 2,
        "repeats": 2,
        "limit": 0.05,
        "prepare": quiet,
        "announce": quiet,
    } | changes
    return rounds_lib.compare(contestants(log), **settings)


def test_contestants_take_turns_and_each_is_prepared(loads):
    loads += [0.0] * 4
    log, lines = [], []
    rounds = compare(log, prepare=lambda n: log.append(f"prepare {n}"), announce=lines.append)
    assert log == ["prepare slow", "slow", "prepare fast", "fast"] * 2
    assert [s.values["run"] for s in rounds.samples["fast"]] == [4, 8]
    assert (rounds.foreign_loads, rounds.discarded, rounds.disturbed) == ((0.0, 0.0), 0, 0)
    assert len(lines) == 2 and "slow 9.00 s" in lines[0] and "foreign load 0.0%" in lines[1]


def test_a_disturbed_round_is_repeated(loads):
    loads += [0.01, 0.02, 0.03, 0.3, 0.0, 0.04]  # round 2: the second contestant was disturbed
    rounds = compare(log := [])
    assert log == ["slow", "fast"] * 3 and loads == []
    assert [s.values["run"] for s in rounds.samples["slow"]] == [1, 5]
    assert (rounds.foreign_loads, rounds.discarded, rounds.disturbed) == ((0.02, 0.04), 1, 0)


def test_when_it_never_gets_quiet_the_least_disturbed_rounds_count(loads):
    loads += [x for load in (0.9, 0.2, 0.8, 0.3) for x in (load, 0.0)]
    rounds = compare([])
    assert (rounds.foreign_loads, rounds.discarded, rounds.disturbed) == ((0.2, 0.3), 2, 2)
    loads += [x for load in (0.9, 0.2, 0.04, 0.3) for x in (load, 0.0)]
    rounds = compare([])
    assert (rounds.foreign_loads, rounds.discarded, rounds.disturbed) == ((0.2, 0.04), 2, 1)


def test_where_load_is_unknown_no_round_is_discarded(loads):
    loads += [None] * 4
    rounds = compare([])
    assert (rounds.foreign_loads, rounds.discarded, rounds.disturbed) == ((None, None), 0, 0)


def test_speed_is_compared_within_rounds():
    def samples(*seconds):
        return tuple(
            rounds_lib.Sample(s, {"memory": m}) for s, m in zip(seconds, (5, None, 7), strict=True)
        )

    rounds = rounds_lib.Rounds({"a": samples(2, 4, 30), "b": samples(1, 1, 10)}, (0, 0, 0), 0, 0)
    assert rounds.speed("b", against="a") == rounds_lib.Summary(3, 2, 4)
    assert rounds.summary("a") == rounds_lib.Summary(4, 2, 30)
    assert rounds.summary("a", "memory") == rounds_lib.Summary(6, 5, 7)
    assert rounds.summary("a", "never") is None
    assert rounds.summary("a").text(1) == "4.0 (2.0–30.0)"


def test_a_command_is_timed_and_its_failure_is_told():
    sample = rounds_lib.run_command([sys.executable, "-c", "import time; time.sleep(0.3)"])
    assert 0.3 <= sample.seconds < 30
    code = "t = __import__('time').process_time\nwhile t() < 0.2: pass"
    assert 0.2 <= rounds_lib.run_command([sys.executable, "-c", code]).values["cpu_seconds"] < 20
    script = "import sys; print('first'); print('error: the last'); sys.exit(3)"
    with pytest.raises(ValueError, match="status 3: error: the last .it was .*python"):
        rounds_lib.run_command([sys.executable, "-c", script])
