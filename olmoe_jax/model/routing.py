"""Routers: which experts compute a token, and with what weight.

A router is a pure function from router logits to a `Routing`, a plain value that experts, losses
and analysis consume without knowing the router. To add one, write the function here and name it in
`ROUTERS`.

Letters: b batch, l length, e experts, k chosen experts.
"""

import difflib
import inspect

import flax.struct
import jax
import jax.numpy as jnp
from jax import ad_checkpoint


@flax.struct.dataclass
class Routing:
    """Where every token goes.

    Attributes:
      logits: float32 [..., experts], before they become scores.
      expert_ids: int32 [..., k], by falling weight under token choice; −1 where there is no expert
        (padding, and under expert choice, where k = experts, every expert that did not choose the
        token).
      weights: float32 [..., k], the factor of that expert's output; 0 where expert_ids is −1.
      num_slots: an upper bound, known at trace time, of how many expert_ids are not −1.
    """

    logits: jax.Array
    expert_ids: jax.Array
    weights: jax.Array
    num_slots: int = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class RoutingOverride:
    """An intervention in the routing of a trained model, as data: another one compiles nothing.

    `layers` are the MoE layers; in the modules below the Transformer their dimension is gone.

    Attributes:
      muted: bool [layers, experts]; such an expert is chosen as before and its output dropped, as
        if its down projection were zero. The weights of the token's other experts stay as they are,
        also in a model that divides them by their sum.
      excluded: bool [layers, experts]; logit −inf: tokens go to the next best expert, and softmax
        scores of all that are left grow so that they sum to one.
      random_seed: int32 [layers]; if not negative, every token goes to k experts drawn uniformly,
        whatever it is, with the weights that the router gave to its own k. Token choice only.
    """

    muted: jax.Array
    excluded: jax.Array
    random_seed: jax.Array

    @classmethod
    def none(cls, num_layers, num_experts):
        """One that changes nothing, to `replace` parts of; `num_layers` of MoE."""
        nowhere = jnp.zeros((num_layers, num_experts), bool)
        return cls(nowhere, nowhere, jnp.full(num_layers, -1, jnp.int32))


def num_groups(batch, group) -> int:
    """Groups of `group` consecutive sequences in a batch; one if group is 0.

    Raises:
      ValueError: the batch is not made of whole groups.
    """
    if group and batch % group:
        raise ValueError(
            f"a batch of {batch} sequences: this model's experts see groups of {group} sequences "
            "(config.losses.load_balancing_group), which must divide it; "
            "Transformer(config) without routing_group takes the whole batch"
        )
    return batch // group if group else 1


SCORES = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid}
LEAST_SUM = 1e-20  # of sigmoids, which may all vanish; lost in any sum of softmax values


def probabilities(router_logits, scores):
    """The scores of all experts, divided by their sum: what balance is measured on.

    Args:
      router_logits: float32 [..., e].
      scores: a key of SCORES.
    Source: DeepSeek-V3 (arXiv 2412.19437), equation 19, whose balance loss does this to sigmoids.
    """
    found = SCORES[scores](router_logits)
    if scores == "softmax":
        return found  # sums to one already
    return found / (jnp.sum(found, axis=-1, keepdims=True) + LEAST_SUM)


def token_choice(
    router_logits, token_mask, *, k, normalize, group, scores="softmax", bias=None
):  # fmt: skip
    """Each token takes the k experts of the highest scores; nothing is dropped.

    Args:
      router_logits: float32 [b, l, e].
      token_mask: bool [b, l]; not used here (`route` removes padding from every router's choice).
      k: experts per token.
      normalize: divide the k scores by their sum (Mixtral, DeepSeek-V3); OLMoE keeps the raw
        softmax values.
      group: not used: each token chooses alone.
      scores: a key of SCORES.
      bias: float32 [e], added to the scores for the choice alone; weights are of the scores
        without it. None: no bias.
    Source: OLMoE (arXiv 2409.02060). Softmax over all experts comes first, then top-k; equal
      scores go to the lowest expert id. Sigmoid and bias: DeepSeek-V3 (arXiv 2412.19437, equations
      13 to 16); the bias is by Wang et al. (arXiv 2408.15664, equation 3).
    """
    del token_mask, group
    affinity = SCORES[scores](router_logits)
    _, expert_ids = jax.lax.top_k(jax.lax.stop_gradient(_biased(affinity, bias)), k)
    if bias is not None:  # in order of weight, as without one
        unbiased = jnp.take_along_axis(jax.lax.stop_gradient(affinity), expert_ids, axis=-1)
        order = jnp.argsort(unbiased, axis=-1, descending=True)
        expert_ids = jnp.take_along_axis(expert_ids, order, axis=-1)
    expert_ids = ad_checkpoint.checkpoint_name(expert_ids, "expert_ids")
    weights = jnp.take_along_axis(affinity, expert_ids, axis=-1)
    if normalize:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + LEAST_SUM)
    return Routing(router_logits, expert_ids, weights, expert_ids.size)


def _biased(affinity, bias):
    return affinity if bias is None else affinity + bias


def expert_choice(router_logits, token_mask, *, k, normalize, group, scores="softmax"):
    """Each expert takes the k · tokens / experts tokens of a group that give it the highest
    score.

    Perfectly balanced, but not causal: whether a token is computed depends on later ones.

    Args: as `token_choice`, and
      k: mean experts per token.
      group: consecutive sequences that experts choose from; 0 is the whole batch.
    Source: Zhou et al. (arXiv 2202.09368) as in OLMoE's ablation: the combine weight is the
      softmax over experts. The paper's code chooses per sequence (group 1) or over the batch
      (group 0).
    """
    b, length, experts = router_logits.shape
    tokens = b // num_groups(b, group) * length
    affinity = SCORES[scores](router_logits)
    real = jnp.where(token_mask[..., None], affinity, -1.0).reshape(-1, tokens, experts)
    per_expert = max(1, k * tokens // experts)
    _, chosen = jax.lax.top_k(jnp.swapaxes(real, 1, 2), per_expert)  # [groups, e, per_expert]
    chosen = ad_checkpoint.checkpoint_name(chosen, "expert_ids")
    group_index, expert_index = jnp.ogrid[: chosen.shape[0], :experts]
    selected = jnp.zeros(real.shape, bool)
    selected = selected.at[group_index[..., None], chosen, expert_index[..., None]].set(True)
    selected = selected.reshape(b, length, experts) & token_mask[..., None]
    weights = jnp.where(selected, affinity, 0.0)
    if normalize:
        weights = weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-9)
    expert_ids = jnp.where(selected, jnp.arange(experts, dtype=jnp.int32), -1)
    return Routing(router_logits, expert_ids, weights, chosen.size)


ROUTERS = {"token_choice": token_choice, "expert_choice": expert_choice}


def get(name):
    """The router called `name`.

    Raises:
      ValueError: there is none.
    """
    if name not in ROUTERS:
        near = difflib.get_close_matches(str(name), ROUTERS, 1, cutoff=0.0)[0]
        raise ValueError(
            f"config.model.router is {name!r}: must be one of {', '.join(ROUTERS)} "
            f"(nearest: {near})"
        )
    return ROUTERS[name]


def route(
    router_logits, token_mask, *, router, k, normalize=False, group=0, scores="softmax", bias=None,
    override=None,
) -> Routing:  # fmt: skip
    """Routing of every token by the router named `router`; padding gets no expert.

    `scores` and `bias` are as of `token_choice`; a router without such an argument is not asked for
    it where they are not set. `override` is the `RoutingOverride` of this layer; the logits
    returned are those that were used.

    The decision is named for `jax.checkpoint`: a layer that is recomputed in the backward pass
    reuses the saved logits, ids and weights (`SAVED_NAMES`). Recomputed logits may differ in the
    last bit and choose another expert on a near-tie; the backward pass would then belong to
    another model.

    Raises:
      ValueError: there is no such router, or it cannot do with scores or bias.
    """
    name = ad_checkpoint.checkpoint_name
    router_logits = name(router_logits.astype(jnp.float32), "router_logits")
    if override is not None:
        router_logits = jnp.where(override.excluded, -jnp.inf, router_logits)
        if bias is not None:  # a score of zero and a large bias would bring it back
            bias = jnp.where(override.excluded, -jnp.inf, bias)
    options = _options(router, scores, bias)
    routing = get(router)(
        router_logits, token_mask, k=k, normalize=normalize, group=group, **options
    )
    if override is not None:
        routing = _overridden(routing, override, router)
    real = token_mask[..., None]
    return routing.replace(
        expert_ids=name(jnp.where(real, routing.expert_ids, -1), "expert_ids"),
        weights=name(jnp.where(real, routing.weights, 0.0), "expert_weights"),
    )


def _options(router, scores, bias):
    """Of `scores` and `bias` those that are set, if the router takes them."""
    options = {} if scores == "softmax" else {"scores": scores}
    options |= {} if bias is None else {"bias": bias}
    taken = inspect.signature(get(router)).parameters
    if lacking := [name for name in options if name not in taken]:
        raise ValueError(
            f"config.model.router is {router!r}: it takes no {lacking[0]} "
            f"(config.model.router_{lacking[0]}); leave that at its default"
        )
    return options


def _overridden(routing, override, router):
    expert_ids = routing.expert_ids
    if router == "token_choice":
        shape, k = routing.logits.shape, expert_ids.shape[-1]
        noise = jax.random.uniform(jax.random.key(override.random_seed.astype(jnp.uint32)), shape)
        drawn = jax.lax.top_k(jnp.where(override.excluded, -1.0, noise), k)[1]
        expert_ids = jnp.where(override.random_seed >= 0, drawn, expert_ids)
    is_muted = override.muted[expert_ids] & (expert_ids >= 0)
    return routing.replace(expert_ids=expert_ids, weights=jnp.where(is_muted, 0.0, routing.weights))


SAVED_NAMES = ("router_logits", "expert_ids", "expert_weights")
