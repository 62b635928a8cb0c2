import json
import math
import re

import numpy as np
import pytest

from olmoe_jax.analysis import resampling, results


def test_what_is_written_is_json_without_nan(tmp_path):
    value = {
        3: resampling.Estimate(np.array([1 / 3, math.nan, math.inf])),
        "ids": (np.int64(7), np.float32(0.1), "é", None, True),
    }
    path = tmp_path / "deep" / "file.json"
    results.write(path, value)
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "3": {"value": [0.333333, None, None], "low": None, "high": None},
        "ids": [7, 0.1, "é", None, True],
    }


def test_results_of_a_former_run_go_and_nothing_else(tmp_path):
    results.write(tmp_path / "summary.json", {"models": {"old": {}, "../out": {}}})
    gone = ["interventions.json", "expert_matching_a_b.json", "old/load.json", "new/prompt.json"]
    kept = ["mine.json", "load.txt", "traces/old/trace.json", "other/load.json"]
    for name in (*gone, *kept):
        results.write(tmp_path / name, [])
    results.write(tmp_path.parent / "out" / "load.json", [])
    results.clear(tmp_path, ["new"])
    left = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert left == sorted(kept) and not (tmp_path / "old").exists()
    assert (tmp_path.parent / "out" / "load.json").exists()
    results.clear(tmp_path / "none")


def test_what_is_written_has_a_known_name():
    names = {name for name in re.findall(r"^  (\w+)\.json", results.__doc__, re.MULTILINE)}
    assert names == {name for name in results.NAMES if "*" not in name} | {
        "expert_matching_weights"
    }


def test_a_value_that_is_no_json_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.json"
    results.write(path, [1])
    with pytest.raises(TypeError):
        results.write(path, {"a": object()})
    assert json.loads(path.read_text()) == [1] and len(list(tmp_path.iterdir())) == 1
