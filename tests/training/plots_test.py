"""Tests of a run's picture: that it is drawn from every shape of run, and replaced whole."""

import os

import matplotlib.image
import numpy as np
import pytest

from olmoe_jax.training import metrics, plots


def write_run(workdir, *, steps=7, layers=2, experts=5, domains=("books", "code"), loss=3.0):
    rng = np.random.default_rng(0)
    with metrics.MetricsWriter(workdir) as writer:
        for step in range(steps + 1):
            record = {}
            if step < steps:
                record["train/loss"] = loss + rng.normal()
                if layers:
                    record |= metrics.router_metrics(
                        rng.dirichlet(np.ones(experts), size=layers), layers=range(1, 2 * layers, 2)
                    )
            if step % 3 == 0 or step == steps:
                record["validation/loss"] = loss
                record |= {
                    f"validation/{domain}/loss": loss + i for i, domain in enumerate(domains)
                }
                if layers:
                    record["router/load"] = rng.dirichlet(np.ones(experts), size=layers).tolist()
            writer.write(step, record)


@pytest.mark.parametrize(
    "run",
    [
        {},
        {"layers": 0},  # dense
        {
            "steps": 257,
            "domains": [f"domain {i}" for i in range(11)],
        },  # smoothed; more domains than colours
        {"experts": 1, "layers": 1},
        {"loss": np.nan},
        {"steps": 0},
    ],
    ids=["moe", "dense", "long", "one expert", "nan", "no step"],
)
def test_a_picture_of_every_kind_of_run(tmp_path, run):
    write_run(tmp_path, **run)
    path = tmp_path / "pictures" / "training.png"
    plots.draw_run(tmp_path, path, unigram_loss=4.0)
    pixels = matplotlib.image.imread(path)
    assert pixels.shape[0] > 500 and pixels.std() > 0.05
    assert [p.name for p in path.parent.iterdir()] == ["training.png"]


def test_what_is_drawn(tmp_path):
    write_run(tmp_path)
    curves, load = plots._collect(tmp_path)
    records = list(metrics.read(tmp_path))
    np.testing.assert_array_equal(load, records[-1]["router/load"])
    steps, values = curves["train/loss"]
    np.testing.assert_array_equal(steps, np.arange(7))
    np.testing.assert_array_equal(values, [record["train/loss"] for record in records[:-1]])
    np.testing.assert_array_equal(curves["validation/code/loss"], [[0, 3, 6, 7], [4.0] * 4])
    assert plots._layers(curves, 2) == [1, 3]


def test_a_failed_drawing_leaves_the_old_picture(tmp_path, monkeypatch):
    write_run(tmp_path)
    path = tmp_path / "training.png"
    path.write_text("old")

    def full(source, target):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        plots.draw_run(tmp_path, path)
    assert path.read_text() == "old"
    assert not list(tmp_path.glob("*.tmp"))
