"""Losses by document at the end of a run: what a bootstrap over documents draws from."""

import functools
import pathlib

import jax
import numpy as np

from olmoe_jax import checkpoints, files, sharding
from olmoe_jax.data import layout, pipeline
from olmoe_jax.model import transformer
from olmoe_jax.studies import results
from olmoe_jax.training import step as step_lib


def measure(workdir, config, data, *, devices=None):
    """Writes Σ nats and number of targets of each validation document to WORKDIR/documents.npz.

    The windows are those of the run's validation, the parameters those of its last checkpoint. A
    target belongs to the document of its own token. Nothing is done where the file is there.

    Args:
      workdir: of a finished run of `config`.
      data: its PreparedData.
      devices: what the mesh is made of; default all.
    """
    target = pathlib.Path(workdir) / results.DOCUMENTS
    if target.is_file():
        return
    batch_size = config.training.batch_size // config.training.micro_batches
    batches = pipeline.validation_batches(
        data, num_windows=config.data.validation_windows, batch_size=batch_size
    )
    found = np.concatenate([batch["documents"].ravel() for batch in batches])
    documents = np.unique(found[found != layout.PADDING_DOCUMENT])
    nats, targets = np.zeros(len(documents)), np.zeros(len(documents))
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
        for batch in batches:
            placed = sharding.place_batch(
                batch, sharding.batch_sharding(mesh), names=step_lib.training_fields(config),
                batch_size=batch_size,
            )  # fmt: skip
            losses = jax.device_get(step(params, placed))[:, :-1]  # the last has no target
            scored = batch["loss_mask"][:, 1:]
            numbers = np.searchsorted(documents, batch["documents"][:, 1:][scored])
            nats += np.bincount(numbers, losses[scored], len(documents))
            targets += np.bincount(numbers, minlength=len(documents))
    if jax.process_index():
        return
    with files.whole(target) as file:
        np.savez(file, documents=documents, nats=nats, targets=targets)
