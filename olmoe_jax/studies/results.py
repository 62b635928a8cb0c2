"""A finished run as a study sees it: curves and final values from its metrics.jsonl, its speed."""

import dataclasses
import json
import pathlib

import numpy as np

from olmoe_jax.studies import causality, declaration
from olmoe_jax.training import metrics, runs

DIVERGED = "diverged.json"
DOCUMENTS = "documents.npz"
FINAL_SHARE = 0.05  # of the steps, over which a training metric's final value is the mean
# Shown over training, beside the metrics of the outcomes.
HEALTH = (
    "router/max_load",
    "router/normalized_entropy",
    "router/dead_experts",
    "train/load_balancing_loss",
    "train/router_z_loss",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """A metric over a run: `values` at `tokens` (those trained on before), float64 [points]."""

    tokens: np.ndarray
    values: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One arm with one seed.

    Attributes:
      arm, seed: which.
      path: its workdir.
      config: its Config.
      curves: metric → Curve, of METRICS, domains' losses and HEALTH.
      tokens_per_second: median over its steps.
      step_seconds: float64 [steps], of each step; of those that were not logged the median.
      load: [MoE layers, experts] at the last checkpoint, shares of the choices; None if dense.
      problem: how it diverged, in one line; None if it finished.
    """

    arm: str
    seed: int
    path: pathlib.Path
    config: object
    curves: dict[str, Curve]
    tokens_per_second: float
    step_seconds: np.ndarray
    load: np.ndarray | None
    problem: str | None = None

    def curve(self, metric) -> Curve:
        """A metric's Curve.

        Raises:
          ValueError: the run has not recorded it; the nearest that it has is named.
        """
        if metric not in self.curves:
            near = declaration.nearest(metric, self.curves)
            raise ValueError(f"{self.path}: has no metric {metric!r}{near}")
        return self.curves[metric]

    def final(self, metric) -> float:
        """A metric at the end: its last value; of a training metric the mean of the last steps."""
        values = self.curve(metric).values
        if metric.startswith("validation/"):
            return float(values[-1])
        return float(values[-max(1, round(FINAL_SHARE * len(values))) :].mean())


def read_run(path, arm, seed) -> Run:
    """The Run whose workdir is `path`, finished or diverged.

    Raises:
      FileNotFoundError: there is no run.
    """
    path = pathlib.Path(path)
    config, _ = runs.read_config(path)
    points, rates, load, last = {}, {}, None, 0
    for record in metrics.read(path):
        for name, value in record.items():
            if name in HEALTH or name in declaration.METRICS or declaration.domain_of(name):
                points.setdefault(name, []).append((record["step"], value))
        if "perf/tokens_per_second" in record:
            rates[record["step"]] = record["perf/tokens_per_second"]
        load = record.get("router/load", load)
        last = record["step"]
    curves = {}
    for name, pairs in points.items():
        steps, values = np.asarray(pairs, np.float64).T
        curves[name] = Curve(tokens=steps * config.tokens_per_step, values=values)
    for name, value in causality.read(path).items():  # of the last checkpoint alone
        end = np.float64([last * config.tokens_per_step])
        curves[name] = Curve(tokens=end, values=np.float64([value]))
    seconds = np.full(last, config.tokens_per_step / np.median(list(rates.values())))
    for step, rate in rates.items():
        seconds[step : step + 1] = config.tokens_per_step / rate
    marker = path / DIVERGED
    return Run(
        arm=arm,
        seed=seed,
        path=path,
        config=config,
        curves=curves,
        tokens_per_second=float(np.median(list(rates.values()))),
        step_seconds=seconds,
        load=None if load is None else np.asarray(load, np.float64),
        problem=json.loads(marker.read_text())["problem"] if marker.is_file() else None,
    )


def read_documents(path) -> dict[str, np.ndarray] | None:
    """What `documents.measure` saved of a run: documents, nats, targets; None if it is absent."""
    file = pathlib.Path(path) / DOCUMENTS
    if not file.is_file():
        return None
    with np.load(file) as arrays:
        return {name: arrays[name] for name in ("documents", "nats", "targets")}
