"""The suite `start_up`, with imports that are quick."""

import json
import sys

import pytest

from experiments import app
from olmoe_jax.benchmarking import options as options_lib
from olmoe_jax.benchmarking import rounds as rounds_lib
from olmoe_jax.benchmarking import start_up


def test_ratios_are_of_seconds_within_rounds(monkeypatch, capsys):
    seconds = {"pass": 0.01, start_up.LIBRARIES: 2.0, start_up.OURS: 1.0, start_up.BENEATH: 4.0,
               start_up.PUBLIC_API: 5.0}  # fmt: skip
    calls = []

    def run_command(command, *, cwd):
        calls.append(command[2])
        assert command[:2] == [sys.executable, "-c"] and (cwd / "olmoe_jax").is_dir()
        slower = 7 if calls.count(command[2]) % 3 == 0 else 1  # a start that was disturbed
        return rounds_lib.Sample(
            seconds[command[2]] * slower, {"cpu_seconds": 0.1, "peak_anonymous_bytes": 3e6}
        )

    monkeypatch.setattr(rounds_lib, "run_command", run_command)
    monkeypatch.setattr(start_up, "seconds_by_package", lambda code: {"jax": 0.5, "flax": 0.25})
    monkeypatch.setattr(rounds_lib, "FOREIGN_LIMIT", 1.0)  # tests may run beside anything
    result, is_right = start_up.run(options_lib.Options(rounds=2))
    assert is_right and len(calls) == 5 + 2 * 3 * 5
    assert result["ratio_import"] == 0.5 and result["ratio_public_api"] == 1.25
    assert result["contestants"]["bare Python"]["seconds"].high == 0.01
    json.dumps(result, default=app._plain)
    shown = capsys.readouterr().out
    assert "olmoe_jax ÷ jax, flax: 0.50" in shown and "jax 0.50, flax 0.25" in shown


def test_every_start_works_and_ours_imports_no_jax():
    code = f"{start_up.OURS}; import sys; sys.exit('jax' in sys.modules)"
    start_up._start(code)
    with pytest.raises(ValueError, match="no_such_name"):
        start_up._start(f"{start_up.OURS}; olmoe_jax.no_such_name")
    start_up._start(start_up.PUBLIC_API)


def test_import_times_add_up_by_package(tmp_path, monkeypatch):
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "__init__.py").write_text("import time, second; time.sleep(0.06)")
    (tmp_path / "first" / "below.py").write_text("import time; time.sleep(0.05)")
    (tmp_path / "second.py").write_text("import time; time.sleep(0.07)")
    monkeypatch.setattr(start_up, "ROOT", tmp_path)
    found = start_up.seconds_by_package("import first.below")
    assert list(found)[:2] == ["first", "second"]
    assert 0.11 <= found["first"] < 1 and 0.07 <= found["second"] < 0.11 + found["first"]
