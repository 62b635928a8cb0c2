"""Running a model with interventions in its routing, on recorded texts.

The layers are those that `recording` runs, so the losses without intervention are the recorded
ones. Each intervention is data of one compiled layer, and begins at the layer it changes: what
comes before is computed once per batch.
"""

import dataclasses
import time

import jax
import numpy as np
import tqdm

from olmoe_jax.analysis import interventions, layerwise, recording
from olmoe_jax.model import routing

TOKENS = 16_384  # of each domain


def run(
    model, texts, chosen, *, max_tokens=TOKENS, precision="float32", tokens_per_batch=None, seed=0,
    announce=print,
) -> interventions.Effects:  # fmt: skip
    """Measures what the interventions of a Plan do.

    Args:
      model: as of `recording.record`.
      texts: `texts.Text`s of the plan's domains.
      chosen: interventions.Plan.
      max_tokens: of each domain, from its beginning.
      precision, tokens_per_batch: as of `recording.record`.
      seed: of uniform routing and of the intervals.
      announce: called with lines for a person; the first says how much there is to do.

    Raises:
      ValueError: the model does not fit in memory, or texts and plan differ.
    """
    if max_tokens < 2:
        raise ValueError(f"intervention_tokens is {max_tokens}: expected 2 or more")
    by_name = {text.domain: text for text in texts}
    if set(by_name) != set(chosen.domains):
        raise ValueError(f"texts of {sorted(by_name)}, interventions for {sorted(chosen.domains)}")
    texts = [_beginning(by_name[name], max_tokens) for name in chosen.domains]
    job = open_job(model, texts, precision=precision, tokens_per_batch=tokens_per_batch)
    losses = [[] for _ in texts]
    with tqdm.tqdm(total=len(job.batches), unit="batch", desc="intervene", disable=None) as bar:
        runner = _Runner(job, chosen, seed)
        for number, batch in enumerate(job.batches):
            if number == 0:
                announce(runner.estimate(batch))
            losses[batch.index].append(runner.losses(batch, number)[:, : batch.num_tokens])
            bar.update()
    found = [
        interventions.Losses.of(np.asarray(text.documents), np.concatenate(parts, 1))
        for text, parts in zip(texts, losses, strict=True)
    ]
    for text, one in zip(texts, found, strict=True):
        if not len(one.tokens):
            raise ValueError(f"domain {text.domain!r}: no token has a next one; take more text")
    return interventions.effects(
        chosen, found, renormalised=job.config.normalize_expert_weights, seed=seed
    )


def open_job(model, texts, **options):
    """The `running.Job` of `recording.open_job`, of a model that fits in memory.

    Raises:
      ValueError: it does not.
    """
    job = recording.open_job(model, texts, **options)
    if recording.too_large(job.weights):
        raise ValueError(
            f"{job.checkpoint.path}: interventions need all weights in memory, "
            f"{job.weights.num_bytes() / 1e9:.2f} GB; leave them out (--interventions=0) or take a "
            "machine with more memory"
        )
    return job


def _beginning(text, tokens):
    return dataclasses.replace(text, tokens=text.tokens[:tokens], documents=text.documents[:tokens])


class _Runner:
    """A model in memory, and the interventions as overrides of its layers."""

    def __init__(self, job, chosen, seed):
        self._job, self._seed, self._interventions = job, seed, chosen.interventions
        config, weights = job.config, job.weights
        self._table, self._head = weights.embedding(), weights.head()
        self._params = [weights.layer(i) for i in range(config.num_layers)]
        self._shared = weights.shared_experts()
        self._moe = [i for i in range(config.num_layers) if config.is_moe_layer(i)]

    def estimate(self, batch) -> str:
        """How much there is to do, timed on one batch, whose programs it compiles."""
        for _ in range(2):  # of which the first compiles
            begun = time.monotonic()
            x = self._embedded(batch)
            jax.block_until_ready([self._after(batch, x, 0, self._override(None, 0))])
            seconds = time.monotonic() - begun
        # from the layer on that it changes: half of the layers on average, and the head
        runs, batches = len(self._interventions), len(self._job.batches)
        tokens = sum(one.num_tokens for one in self._job.batches)
        total = seconds * batches * (1 + 0.6 * runs)
        about = f"{total / 60:.0f} min" if total >= 90 else f"{max(total, 1):.0f} s"
        return f"interventions: {runs} runs of {tokens:,} tokens, about {about}"

    def losses(self, batch, number):
        """float32 [1 + interventions, size · length]; the first without intervention."""
        inputs, none = [self._embedded(batch)], self._override(None, number)
        for layer in range(self._job.config.num_layers - 1):
            inputs.append(self._layer(batch, inputs[-1], layer, none))
        last = self._job.config.num_layers - 1
        out = [self._after(batch, inputs[last], last, none)]
        for one in self._interventions:
            start = 0 if one.layer is None else self._moe[one.layer]
            override = self._override(one, number)
            out.append(self._after(batch, inputs[start], start, override))
        return np.stack(out)

    def _embedded(self, batch):
        return layerwise.embed(self._table, batch.arrays()[0], self._job.config)

    def _layer(self, batch, x, layer, override):
        is_moe = self._job.config.is_moe_layer(layer)
        own = jax.tree.map(lambda a: a[self._moe.index(layer)], override) if is_moe else None
        return layerwise.apply_overridden(
            self._params[layer], x, batch.arrays()[1], own, self._job.segment_ids(batch),
            self._shared, config=self._job.config, is_moe=is_moe,
        )  # fmt: skip

    def _after(self, batch, x, start, override):
        """float32 [size · length]: losses of the layers from `start` on."""
        config = self._job.config
        for layer in range(start, config.num_layers):
            x = self._layer(batch, x, layer, override)
        next_ids = batch.arrays()[2]
        _, losses = layerwise.apply_head(*self._head, x, next_ids, config=config)
        return np.asarray(losses).reshape(-1)

    def _override(self, one, number):
        """RoutingOverride of all MoE layers, on the host."""
        layers, experts = len(self._moe), self._job.config.num_experts
        out = {
            "muted": np.zeros((layers, experts), bool),
            "excluded": np.zeros((layers, experts), bool),
            "random_seed": np.full(layers, -1, np.int32),
        }
        if one is not None and one.kind == interventions.UNIFORM:
            rows = slice(None) if one.layer is None else one.layer
            # another draw for every batch and layer: a seed gives a place in a batch one draw
            seeds = (self._seed + number) * layers + np.arange(layers)
            out["random_seed"][rows] = seeds[rows]
        elif one is not None:
            out[one.kind][one.layer, one.expert] = True
        return routing.RoutingOverride(**out)
