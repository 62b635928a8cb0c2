"""One training step and one validation step, as pure functions of (state, batch).

A train state is a plain dict: `params`, `opt_state`, `step` (int32, updates made), `rng` (key
data; streams are folded from it and the step — the model itself draws no random numbers while
training). A batch is a dict of arrays [batch, length]: `tokens`, `token_mask` (False: padding),
`loss_mask` (False: not a target), for validation `domains`, and with `data.mask_documents` the
`documents`: int32, the number of the document that a token belongs to.

With document masking a position attends to its own document's part of the window only. Tokens keep
their positions in the window, as in OLMo, whose varlen attention gets the documents' lengths behind
a rotation that does not know of them (allenai/OLMo 04a2da5, `olmo/model.py`; OLMo-core fa6c501
counts anew in each document, `nn/rope.py`): the rotary embedding is relative, so the two agree up
to rounding. An end-of-document token belongs to the document that it ends. Targets stay as they
are: the first token of a document is predicted from the last one of the document before it.
"""

import functools
import typing

import jax
import jax.numpy as jnp

from olmoe_jax import losses, sharding
from olmoe_jax.model import transformer
from olmoe_jax.training import balancing, optimizer


def training_fields(config) -> tuple[str, ...]:
    """What a train step of this Config reads of a batch."""
    fields = ("tokens", "token_mask", "loss_mask")
    return (*fields, "documents") if config.data.mask_documents else fields


def validation_fields(config) -> tuple[str, ...]:
    """What a validation step of this Config reads of a batch."""
    return (*training_fields(config), "domains")


class Parts(typing.NamedTuple):
    """What one micro-batch contributes; all fields add up over micro-batches.

    Attributes:
      cross_entropy: float32, Σ over targets / the batch's denominator.
      load_balancing, router_z: float32, unweighted parts of the batch's losses.
      statistics: losses.RoutingStatistics with one group: the loss's counts and probabilities.
      load: float32 [MoE layers, experts], tokens that chose each expert.
      layer_square: float32 [layers], mean square of the residual stream / number of micro-batches.
    """

    cross_entropy: jax.Array
    load_balancing: jax.Array
    router_z: jax.Array
    statistics: losses.RoutingStatistics | None
    load: jax.Array | None
    layer_square: jax.Array


class Totals(typing.NamedTuple):
    """Numbers of the whole batch that every micro-batch divides by."""

    targets: jax.Array
    tokens: jax.Array
    groups: jax.Array


def _totals(batch, config):
    _, weights = losses.next_token_targets(batch["tokens"], batch["loss_mask"])
    if config.losses.count_masked:
        targets = jnp.float32(batch["tokens"].size)
    else:
        targets = jnp.maximum(jnp.sum(weights), 1)
    group = config.losses.load_balancing_group
    grouped = batch["token_mask"].reshape(batch["tokens"].shape[0] // group if group else 1, -1)
    return Totals(
        targets, jnp.sum(batch["token_mask"], dtype=jnp.float32), jnp.sum(jnp.any(grouped, axis=1))
    )


def _statistics(routing, token_mask, config):
    return losses.routing_statistics(
        routing.logits, routing.expert_ids, token_mask,
        convention=config.losses.load_balancing_convention,
        group=config.losses.load_balancing_group, scores=config.model.router_scores,
    )  # fmt: skip


def _load(routing, token_mask):
    """float32 [MoE layers, experts]: tokens that chose each expert, whatever the loss counts."""
    statistics = losses.routing_statistics(
        routing.logits, routing.expert_ids, token_mask, convention="olmoe", group=0
    )
    return statistics.counts[:, 0]


def _features(model, params, batch, config):
    return model.apply(
        {"params": params}, batch["tokens"], token_mask=batch["token_mask"],
        segment_ids=batch["documents"] if config.data.mask_documents else None, method="features",
    )  # fmt: skip


def _one_group(statistics):
    return losses.RoutingStatistics(
        jnp.sum(statistics.counts, axis=1, keepdims=True),
        jnp.sum(statistics.probs, axis=1, keepdims=True),
        jnp.sum(statistics.tokens, keepdims=True),
    )


def _objective(params, micro, whole_batch, *, model, config, totals):
    """(objective, Parts) of one micro-batch."""
    features = _features(model, params, micro, config)
    targets, weights = losses.next_token_targets(micro["tokens"], micro["loss_mask"])
    head = transformer.head_weights(params)
    with jax.named_scope("head"):
        nats = losses.cross_entropy_sum(features.hidden, head, targets, weights)
    cross_entropy = nats / totals.targets
    square = jnp.square(features.layer_rms) / config.training.micro_batches
    if features.routing is None:
        zero = jnp.float32(0)
        return cross_entropy, Parts(cross_entropy, zero, zero, None, None, square)
    routing, mask = features.routing, micro["token_mask"]
    statistics = _statistics(routing, mask, config)
    balance = losses.load_balancing_loss(
        statistics, convention=config.losses.load_balancing_convention,
        num_experts_per_token=config.model.num_experts_per_token,
        whole_batch=whole_batch, num_groups=totals.groups,
    )  # fmt: skip
    z = losses.router_z_loss(routing.logits, mask, num_tokens=totals.tokens)
    objective = cross_entropy + config.losses.router_z_weight * z
    if config.model.router != "expert_choice":  # balanced by construction: the loss is only logged
        objective += config.losses.load_balancing_weight * balance
    return objective, Parts(
        cross_entropy, balance, z, _one_group(statistics), _load(routing, mask), square
    )


def needs_counting_pass(config) -> bool:
    """Whether a step first runs the model forward over all micro-batches to count the experts'
    load.

    The load-balancing loss over the whole batch multiplies by the batch's load, which no single
    micro-batch knows.
    """
    return bool(
        config.model.num_experts
        and config.training.micro_batches > 1
        and config.losses.load_balancing_group == 0
        and config.losses.load_balancing_weight > 0
        and config.model.router != "expert_choice"
    )


def loss_and_gradient(params, batch, *, model, config):
    """Gradient of the whole batch's objective, and what it is made of.

    Args:
      params: parameter tree, float32.
      batch: dict of [batch, length] arrays.
    Returns:
      (gradient tree in float32, Parts of the whole batch with `load_balancing` as its convention
      defines it).
    """
    count, totals = config.training.micro_batches, _totals(batch, config)
    micros = {
        name: sharding.constrain(
            batch[name].reshape(count, -1, batch[name].shape[1]), None, "batch", None
        )
        for name in training_fields(config)
    }
    objective = functools.partial(_objective, model=model, config=config, totals=totals)
    shardings = None
    if not (mesh := jax.sharding.get_abstract_mesh()).empty:
        shardings = sharding.parameter_shardings(params, mesh)

    def laid_out(grads):  # without this the sum over a scan is kept whole on every device
        return grads if shardings is None else jax.lax.with_sharding_constraint(grads, shardings)

    def gradient(micro, whole_batch):
        (_, parts), grads = jax.value_and_grad(objective, has_aux=True)(params, micro, whole_batch)
        return laid_out(grads), parts

    if count == 1:
        grads, parts = gradient(jax.tree.map(lambda x: x[0], micros), None)
    else:
        whole_batch = None
        if needs_counting_pass(config):

            def count_one(micro):
                features = _features(model, params, micro, config)
                return _statistics(features.routing, micro["token_mask"], config)

            per_micro = jax.lax.map(count_one, micros)
            whole_batch = jax.tree.map(lambda x: jnp.sum(x, axis=0), per_micro)

        def add(total, micro):
            return jax.tree.map(jnp.add, total, gradient(micro, whole_batch)), None

        shapes = jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], micros), whole_batch)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        (grads, parts), _ = jax.lax.scan(add, (laid_out(zeros[0]), zeros[1]), micros)
    if parts.statistics is not None and config.losses.load_balancing_group == 0:
        balance = losses.load_balancing_loss(
            parts.statistics, convention=config.losses.load_balancing_convention,
            num_experts_per_token=config.model.num_experts_per_token,
        )  # fmt: skip
        parts = parts._replace(load_balancing=balance)
    return grads, parts


def init_state(key, *, config):
    """A fresh train state. Traceable: under jit with out_shardings no device holds the whole of
    it."""
    init_key, rng = jax.random.split(key)
    ungrouped = transformer.Transformer(config.model)  # one sequence is no whole group
    params = ungrouped.init(init_key, jnp.zeros((1, 2), jnp.int32))["params"]
    opt_state = optimizer.make_optimizer(config.optimizer).init(params)
    return {
        "params": params,
        "opt_state": opt_state,
        "step": jnp.int32(0),
        "rng": jax.random.key_data(rng),
    }


def train_step(state, batch, *, model, config):
    """One update.

    Returns:
      (new state, metrics): float32 scalars `loss` (cross entropy, nats), `load_balancing_loss`
      (1.0 is balanced), `router_z_loss`, `learning_rate`, `gradient_norm`; `gradient_norms` by
      group and `layer_gradient_norms` [layers]; `layer_rms` [layers]; `load` [MoE layers,
      experts], each expert's share of a layer's choices. All are of the parameters before the
      update.
    """
    grads, parts = loss_and_gradient(state["params"], batch, model=model, config=config)
    rate = optimizer.learning_rate(
        config.optimizer, state["step"], config.tokens_per_step, config.training.num_steps
    )
    with jax.named_scope("optimizer"):
        norms = optimizer.global_norms(grads)
        grads = optimizer.clip(grads, norms.total, config.optimizer.clip_norm)
        params, opt_state = optimizer.update(
            config.optimizer, grads, state["opt_state"], state["params"], rate
        )
    if config.model.router_bias:
        params = balancing.move_biases(params, parts.load, config.losses.router_bias_rate)
    metrics = {
        "loss": parts.cross_entropy,
        "learning_rate": rate,
        "gradient_norm": norms.total,
        "gradient_norms": norms.groups,
        "layer_gradient_norms": norms.layers,
        "layer_rms": jnp.sqrt(parts.layer_square),
    }
    if parts.load is not None:
        balanced = losses.balanced_value(
            config.losses.load_balancing_convention, config.model.num_experts_per_token
        )
        metrics |= {
            "load_balancing_loss": parts.load_balancing / balanced,
            "router_z_loss": parts.router_z,
            "load": parts.load / jnp.maximum(jnp.sum(parts.load, axis=-1, keepdims=True), 1),
        }
    new_state = {
        "params": params,
        "opt_state": opt_state,
        "step": state["step"] + 1,
        "rng": state["rng"],
    }
    return new_state, metrics


def validation_step(params, batch, *, model, config, num_domains):
    """Sums over one batch of validation windows.

    Returns:
      dict of float32: `loss` and `targets` [domains], Σ nats and number of targets by the target
      token's domain; in a MoE also `router_z` (Σ over tokens of the layers' mean), `tokens`, and
      `statistics` (RoutingStatistics).
    """
    features = _features(model, params, batch, config)
    nats, weights = _target_losses(features, params, batch)
    domains = (
        jax.nn.one_hot(jnp.roll(batch["domains"], -1, axis=1), num_domains) * weights[..., None]
    )
    sums = {
        "loss": jnp.einsum("bl,blk->k", nats, domains),
        "targets": jnp.sum(domains, axis=(0, 1)),
    }
    if features.routing is not None:
        sums |= {
            "router_z": losses.router_z_loss(
                features.routing.logits, batch["token_mask"], num_tokens=1
            ),
            "tokens": jnp.sum(batch["token_mask"], dtype=jnp.float32),
            "statistics": _statistics(features.routing, batch["token_mask"], config),
            "load": _load(features.routing, batch["token_mask"]),
        }
    return sums


def target_losses(params, batch, *, model, config):
    """Nats of the target behind each position, 0 where there is none: float32 [batch, length]."""
    return _target_losses(_features(model, params, batch, config), params, batch)[0]


def _target_losses(features, params, batch):
    """(nats of each position's target, 0 where its weight is 0; the weights), [batch, length]."""
    targets, weights = losses.next_token_targets(batch["tokens"], batch["loss_mask"])
    nats = losses.token_losses(features.hidden, transformer.head_weights(params), targets)
    return jnp.where(weights > 0, nats, 0), weights
