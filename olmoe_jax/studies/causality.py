"""Does a token's loss depend on the text behind it? Measured by putting another text there.

Under expert choice it does: an expert takes the best tokens of a batch, so later tokens decide
which earlier ones are computed. In text that is being generated there are no later tokens.
"""

import functools
import json
import pathlib

import jax
import numpy as np

from olmoe_jax import checkpoints, files, sharding
from olmoe_jax.data import pipeline
from olmoe_jax.model import transformer
from olmoe_jax.training import step as step_lib

FILE = "causality.json"
DEPENDENCE = "validation/future_dependence"
ADVANTAGE = "validation/future_advantage"


def measure(workdir, config, data, *, devices=None):
    """Writes DEPENDENCE and ADVANTAGE of a run's last checkpoint to WORKDIR/causality.json.

    Of every validation window the first half stays; behind it comes the second half of another one,
    of the next batch where there are several. Over the targets in first halves, with `own` and
    `other` their losses in nats before and after:

      future_dependence   mean |other − own|: 0 in a causal model, but for rounding
      future_advantage    mean (other − own): what knowing the true future takes off the loss

    Nothing is done where the file is there.

    Args:
      workdir: of a finished run of `config`.
      data: its PreparedData.
      devices: what the mesh is made of; default all.
    Raises:
      ValueError: as `check`.
    """
    target = pathlib.Path(workdir) / FILE
    if target.is_file():
        return
    check(config, data)
    batch_size = config.training.batch_size // config.training.micro_batches
    batches = pipeline.validation_batches(
        data, num_windows=config.data.validation_windows, batch_size=batch_size
    )
    mesh = sharding.make_mesh(config.mesh, devices)
    model = transformer.Transformer(config.model, routing_group=config.losses.load_balancing_group)
    newest = checkpoints.list_checkpoints(workdir)[-1][1]
    shardings = sharding.parameter_shardings(checkpoints.abstract_params(config.model), mesh)
    with jax.set_mesh(mesh):
        params = checkpoints.read_params(newest, config.model, shardings, dtype="float32")
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        step = jax.jit(
            functools.partial(step_lib.target_losses, model=model, config=config),
            out_shardings=everywhere,
        )
        names = step_lib.training_fields(config)

        def losses(batch):
            placed = sharding.place_batch(
                batch, sharding.batch_sharding(mesh), names=names,
                batch_size=batch_size,
            )  # fmt: skip
            return jax.device_get(step(params, placed))

        differences = []
        for batch, others in zip(batches, other_windows(batches, names), strict=True):
            own, other = losses(batch), losses(with_other_future(batch, others, names))
            half = batch["tokens"].shape[1] // 2
            scored = batch["loss_mask"][:, 1:half]  # the targets of positions 0 … half − 2
            differences.append((other - own)[:, : half - 1][scored])
    if jax.process_index():
        return
    every = np.concatenate(differences).astype(np.float64)
    content = {DEPENDENCE: float(np.abs(every).mean()), ADVANTAGE: float(every.mean())}
    files.write_text(target, json.dumps(content) + "\n")


def check(config, data):
    """Refuses data with a single validation window: no other text could come behind it.

    Raises:
      ValueError: it is so; config and data, as of `measure`.
    """
    available = data.num_windows("validation")
    if min(config.data.validation_windows or available, available) < 2:
        raise ValueError(
            f"{DEPENDENCE} needs two validation windows: {data.path} has {available}, and "
            f"data.validation_windows is {config.data.validation_windows} (0: all)"
        )


def other_windows(batches, names) -> list[dict]:
    """For each batch the fields `names` of a batch of other windows, each in one place.

    The windows of all batches stand in a circle, from which padding rows are left out: the other
    window is that a batch further on, or of a single batch the next. Padding rows stay.
    """
    real = [batch["token_mask"].any(axis=1) for batch in batches]
    count, batch_size = sum(int(rows.sum()) for rows in real), len(real[0])
    shift = batch_size if count > batch_size else 1
    rolled = {
        name: np.roll(
            np.concatenate([batch[name][rows] for batch, rows in zip(batches, real, strict=True)]),
            -shift, axis=0,
        )
        for name in names
    }  # fmt: skip
    out, first = [], 0
    for batch, rows in zip(batches, real, strict=True):
        found = {name: batch[name].copy() for name in names}
        last = first + int(rows.sum())
        for name in names:
            found[name][rows] = rolled[name][first:last]
        out.append(found)
        first = last
    return out


def with_other_future(batch, other, names) -> dict:
    """The fields `names` of a batch, second halves from `other`, of the same shape."""
    half = batch["tokens"].shape[1] // 2
    return {
        name: np.concatenate([batch[name][:, :half], other[name][:, half:]], axis=1)
        for name in names
    }


def read(path) -> dict[str, float]:
    """{metric: value} that `measure` wrote for a run; empty if it has not."""
    file = pathlib.Path(path) / FILE
    return json.loads(file.read_text()) if file.is_file() else {}


def is_asked_for(study) -> bool:
    """Whether an outcome of a Study is about what is measured here."""
    return any(outcome.metric in (DEPENDENCE, ADVANTAGE) for outcome in study.outcomes)
