import json
import math

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


def test_a_value_that_is_no_json_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.json"
    results.write(path, [1])
    with pytest.raises(TypeError):
        results.write(path, {"a": object()})
    assert json.loads(path.read_text()) == [1] and len(list(tmp_path.iterdir())) == 1
