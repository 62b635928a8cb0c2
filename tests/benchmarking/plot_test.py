"""Pictures of results."""

import os

import pytest

from olmoe_jax import machine
from olmoe_jax.benchmarking import plot
from olmoe_jax.benchmarking import rounds as rounds_lib

RESULT = {
    "suite": "train_step",
    "dtype": "float32",
    "ratio_same_allocator": 1.25,
    "ratio_as_shipped": 0.5,
    "ratio_of_nothing": None,
    "contestants": {
        "ours": {"seconds": rounds_lib.Summary(3.0, 2.0, 5.0)},
        "transformers": {"seconds": {"median": 4.0, "low": 3.5, "high": 4.25}},
        "unmeasured": {"seconds": None},
        "matmul peak": {"seconds": rounds_lib.Summary(0.1, 0.1, 0.1)},
    },
}


@pytest.fixture
def axes(monkeypatch):
    """The axes that a drawing had, once it is drawn."""
    found, save = [], plot.figure.Figure.savefig

    def remember(self, *args, **kwargs):
        found.extend(self.axes)
        return save(self, *args, **kwargs)

    monkeypatch.setattr(plot.figure.Figure, "savefig", remember)
    return found


def test_ratios_and_contestants_are_drawn_as_they_are(tmp_path, axes):
    plot.draw(RESULT | {"environment": machine.environment()}, tmp_path / "new" / "picture.png")
    assert os.listdir(tmp_path / "new") == ["picture.png"]
    assert (tmp_path / "new" / "picture.png").read_bytes().startswith(b"\x89PNG")
    ratios, seconds = axes
    assert [tick.get_text() for tick in ratios.get_yticklabels()] == [
        "as shipped", "same allocator"
    ]  # fmt: skip
    assert [bar.get_width() for bar in ratios.patches] == [0.5, 1.25]
    assert [bar.get_width() for bar in seconds.patches] == [0.1, 4.0, 3.0]
    assert [text.get_text().strip() for text in seconds.texts] == ["0.1 s", "4 s", "3 s"]
    ours, theirs = seconds.patches[2], seconds.patches[1]
    assert ours.get_facecolor() != theirs.get_facecolor()
    (segments,) = [lines.get_segments() for lines in seconds.collections]
    assert segments[1][:, 0].tolist() == [3.5, 4.25]


def test_what_a_result_lacks_is_left_out(tmp_path, axes):
    plot.draw({"suite": "port", "ratio_a": 2.0}, tmp_path / "picture.png")
    assert len(axes) == 1 and [bar.get_width() for bar in axes[0].patches] == [2.0]
