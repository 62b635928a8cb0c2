"""Validation by domain over a fixed list of windows, and the baselines that show what a loss is
worth."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from olmoe_jax import losses, sharding
from olmoe_jax.data import pipeline
from olmoe_jax.training import step as step_lib


def _targets(batch):
    """(domains, tokens) of a batch's targets, each [targets]."""
    keep = batch["loss_mask"][:, 1:]
    return batch["domains"][:, 1:][keep], batch["tokens"][:, 1:][keep]


def target_bytes(batches, data):
    """float64 [domains]: bytes of text of the targets of a list of batches, by the target's
    domain."""
    total = np.zeros(len(data.info.domains))
    for batch in batches:
        domains, tokens = _targets(batch)
        total += np.bincount(domains, data.token_bytes[tokens], len(total))
    return total


def by_domain(loss_sums, targets, num_bytes, domains, suffix="") -> dict:
    """Σ nats, target counts and their bytes, per domain → mean losses and bits per byte, overall
    and each."""

    def bits(nats, size):
        return float(nats / math.log(2) / size) if size else 0.0

    out = {
        f"validation/{suffix}loss": float(loss_sums.sum() / max(1.0, targets.sum())),
        f"validation/{suffix}bits_per_byte": bits(loss_sums.sum(), num_bytes.sum()),
    }
    for domain, nats, count, size in zip(domains, loss_sums, targets, num_bytes, strict=True):
        if count:
            out[f"validation/{domain}/{suffix}loss"] = float(nats / count)
            out[f"validation/{domain}/{suffix}bits_per_byte"] = bits(nats, size)
    return out


class Validator:
    """Evaluates parameters on the fixed windows of a run's validation split."""

    def __init__(self, model, config, data, mesh):
        self._config, self._data = config, data
        self._sharding = sharding.batch_sharding(mesh)
        self._batch_size = config.training.batch_size // config.training.micro_batches
        self._batches = pipeline.validation_batches(
            data, num_windows=config.data.validation_windows, batch_size=self._batch_size
        )
        self._bytes = target_bytes(self._batches, data)
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        self._step = jax.jit(
            functools.partial(
                step_lib.validation_step,
                model=model,
                config=config,
                num_domains=len(data.info.domains),
            ),
            out_shardings=everywhere,
        )

    def _sums(self, params, batches):
        names, rows = step_lib.validation_fields(self._config), self._batch_size
        placed = (
            sharding.place_batch(b, self._sharding, names=names, batch_size=rows) for b in batches
        )
        return [jax.device_get(self._step(params, batch)) for batch in placed]

    def measure(self, params) -> dict:
        """validation/… values of `params`: losses by domain, and in a MoE the auxiliary losses and
        load.

        The load-balancing loss is over groups of `losses.load_balancing_group` windows of the
        list, or over all of them; 1.0 is balanced.
        """
        sums = self._sums(params, self._batches)
        out = by_domain(
            sum(s["loss"] for s in sums),
            sum(s["targets"] for s in sums),
            self._bytes,
            self._data.info.domains,
        )
        if "statistics" not in sums[0]:
            return out
        config, model = self._config.losses, self._config.model
        groups = [s["statistics"] for s in sums]
        if config.load_balancing_group:
            merged = losses.RoutingStatistics(
                np.concatenate([g.counts for g in groups], axis=1),
                np.concatenate([g.probs for g in groups], axis=1),
                np.concatenate([g.tokens for g in groups]),
            )
        else:
            merged = jax.tree.map(lambda *x: sum(x), *groups)
        balance = losses.load_balancing_loss(
            jax.tree.map(jnp.asarray, merged), convention=config.load_balancing_convention,
            num_experts_per_token=model.num_experts_per_token,
        )  # fmt: skip
        balanced = losses.balanced_value(
            config.load_balancing_convention, model.num_experts_per_token
        )
        load = sum(s["load"] for s in sums)
        share = load / np.maximum(load.sum(axis=-1, keepdims=True), 1)
        return out | {
            "validation/load_balancing_loss": float(balance) / balanced,
            "validation/router_z_loss": float(
                sum(s["router_z"] for s in sums) / max(1.0, sum(s["tokens"] for s in sums))
            ),
            "validation/dead_experts": int((share == 0).sum()),
            "router/load": share.tolist(),
        }

    def measure_shuffled(self, params, draws=8) -> dict:
        """validation/{intact,shuffled}_loss: tokens predicted behind their context, and behind
        a random permutation of it.

        The context is what the model sees: with `data.mask_documents` that of the document of the
        token in front of the target. In each of `draws` passes one target per window is scored, in
        its second half, so that each has a real context; both losses are over the same targets.
        """
        results = {}
        for name in ("intact", "shuffled"):
            sums = []
            for draw in range(draws):
                rng = np.random.default_rng(draw)
                batches = [
                    _one_target(
                        batch, rng, shuffle=name == "shuffled",
                        in_document=self._config.data.mask_documents,
                    )
                    for batch in self._batches
                ]  # fmt: skip
                sums += self._sums(params, batches)
            total, count = sum(s["loss"].sum() for s in sums), sum(s["targets"].sum() for s in sums)
            results[f"validation/{name}_loss"] = float(total / max(1.0, count))
        return results


def _one_target(batch, rng, *, shuffle, in_document):
    """The batch with one target per row, and what precedes it permuted or not."""
    tokens, mask = np.array(batch["tokens"]), np.zeros_like(batch["loss_mask"])
    length = tokens.shape[1]
    for row in range(tokens.shape[0]):
        target, order = int(rng.integers(length // 2, length)), rng.permutation(length)
        mask[row, target] = batch["loss_mask"][row, target]
        if shuffle:
            seen = np.arange(length) < target
            if in_document:
                seen &= batch["documents"][row] == batch["documents"][row, target - 1]
            tokens[row, seen] = tokens[row, order[seen[order]]]
    return batch | {"tokens": tokens, "loss_mask": mask}


def unigram_baseline(data, config) -> dict:
    """validation/unigram_… losses: a model that knows only how often each token occurs in training.

    Add-one smoothing over the tokenizer's vocabulary; the same windows and targets as
    `Validator.measure`.
    """
    counts = np.asarray(data.unigram_counts, np.float64)[: data.info.vocab_size] + 1
    nats = -np.log(counts / counts.sum())
    batches = pipeline.validation_batches(
        data, num_windows=config.data.validation_windows, batch_size=config.training.batch_size
    )
    sums, targets = np.zeros(len(data.info.domains)), np.zeros(len(data.info.domains))
    for batch in batches:
        domains, tokens = _targets(batch)
        sums += np.bincount(domains, nats[tokens], len(sums))
        targets += np.bincount(domains, minlength=len(targets))
    return by_domain(
        sums, targets, target_bytes(batches, data), data.info.domains, suffix="unigram_"
    )
