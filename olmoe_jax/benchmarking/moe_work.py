"""One MoE layer forward and backward: random work with a known routing, ours, and the truth.

What the suites `moe_layer` and `experts` share. The router's columns are orthonormal, and tokens
are made of noise beside them plus the logits that they are to have: every dtype and every peer then
chooses the same experts, and how even their loads are is ours to say.

Letters: t tokens, d d_model, e experts, k chosen experts, f d_ff.
"""

import dataclasses
import functools
import statistics
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from olmoe_jax import config as config_lib
from olmoe_jax.benchmarking import rounds as rounds_lib
from olmoe_jax.model import experts, moe
from olmoe_jax.model.experts import dense

BALANCED, TO_FEW = "balanced", "all tokens to the same experts"
MARGIN = 4.0  # of a chosen expert's logit over the others', which lie within ±0.5
WEIGHTS = ("w_gate", "w_up", "w_down")
# Of a tensor's largest value: order of summation; rounding of activations and sums.
TOLERANCE = {"float32": 5e-5, "bfloat16": 3e-2}
BEYOND = 1e9  # instead of NaN and infinity, which JSON does not have


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Inputs of a layer.

    Attributes:
      x, d_y: [t, d], the layer's dtype: its input, and the gradient with respect to its output.
      expert_ids: int32 [t, k], rising: what the router must choose.
    """

    x: np.ndarray
    d_y: np.ndarray
    expert_ids: np.ndarray


def make_config(*, dtype, **shape) -> config_lib.ModelConfig:
    """A ModelConfig of one layer; `shape`: d_model, d_ff, num_experts, num_experts_per_token."""
    return config_lib.ModelConfig(
        num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2, dtype=dtype, **shape
    )


def make_params(config, seed=0) -> dict:
    """Random router [d, e], w_gate and w_up [e, d, f], w_down [e, f, d], all in config.dtype."""
    rng, dtype = np.random.default_rng(seed), jnp.dtype(config.dtype)
    d, e, f = config.d_model, config.num_experts, config.d_ff
    router, _ = np.linalg.qr(rng.standard_normal((d, e), np.float32))
    params = {"router": router.astype(dtype)}
    for name, shape in zip(WEIGHTS, ((e, d, f), (e, d, f), (e, f, d)), strict=True):
        weights = rng.standard_normal(shape, np.float32)
        weights *= shape[1] ** -0.5
        params[name] = weights.astype(dtype, copy=False)
    return params


def make_tokens(config, router, *, count, routing, seed=1) -> Tokens:
    """Random tokens that choose their experts at random, or all of them the first k.

    Args:
      router: of `make_params`.
      count: tokens.
      routing: BALANCED or TO_FEW.
    """
    rng, dtype = np.random.default_rng(seed), jnp.dtype(config.dtype)
    d, e, k = config.d_model, config.num_experts, config.num_experts_per_token
    order = np.argsort(rng.random((count, e)), axis=1) if routing == BALANCED else np.arange(e)
    expert_ids = np.broadcast_to(np.sort(order[..., :k]), (count, k)).astype(np.int32)
    logits = rng.random((count, e), np.float32) - 0.5
    np.put_along_axis(logits, expert_ids, MARGIN + logits[:, :k], axis=1)
    router = router.astype(np.float32)
    noise = rng.standard_normal((count, d), np.float32)
    x = noise + (logits - noise @ router) @ router.T
    d_y = rng.standard_normal((count, d), np.float32)
    return Tokens(x.astype(dtype), d_y.astype(dtype), expert_ids)


def make_layer(config):
    """Jitted (params, x [t, d], d_y [t, d]) → dict: y, expert_ids, d_x and the gradient of each
    parameter by its name."""
    c = config
    layer = moe.MoE(
        num_experts=c.num_experts, num_experts_per_token=c.num_experts_per_token,
        num_shared_experts=0, d_ff=c.d_ff, router="token_choice", normalize_expert_weights=False,
        router_dtype=jnp.dtype(c.router_dtype), expert_backend=c.expert_backend,
        capacity_factor=c.capacity_factor, group=0,
        kernel_init=nn.initializers.zeros,
    )  # fmt: skip

    def forward(params, x):
        y, routed = layer.apply({"params": params}, x[None], jnp.ones((1, x.shape[0]), bool))
        return y[0], routed.expert_ids[0]

    @jax.jit
    def forward_backward(params, x, d_y):
        y, pull, expert_ids = jax.vjp(forward, params, x, has_aux=True)
        d_params, d_x = pull(d_y)
        return {"y": y, "expert_ids": expert_ids, "d_x": d_x, **d_params}

    return forward_backward


@dataclasses.dataclass(frozen=True)
class Truth:
    """What part of the outputs must be, computed by the `dense` backend in float32.

    Attributes:
      rows: the first tokens, whose y and d_x are compared.
      experts: whose weights' gradients are compared.
      values: {name: float32 array}.
    """

    rows: int
    experts: tuple[int, ...]
    values: dict

    def pick(self, outputs) -> dict:
        """The part of a layer's outputs that `values` speaks of."""
        picked = {name: outputs[name][: self.rows] for name in ("y", "d_x")}
        picked |= {name: outputs[name][np.array(self.experts)] for name in WEIGHTS}
        if "router" in self.values:
            picked["router"] = outputs["router"]
        return picked

    def error(self, picked) -> float:
        """Largest deviation of any tensor, as a share of its largest value."""
        errors = [0.0]
        for name, want in self.values.items():
            got = np.asarray(picked[name]).astype(np.float32)
            errors.append(float(np.max(np.abs(got - want)) / np.max(np.abs(want))))
        return max((e if np.isfinite(e) else BEYOND) for e in errors)


def truth(config, params, tokens, *, routing) -> Truth:
    """Of all that follows from these experts alone, and from these tokens.

    Dense work is e/k times the layer's, so it is not done for everything. TO_FEW: every output, as
    k experts have all the tokens, and one more that must get no gradient. BALANCED: y and d_x of
    the first 64 tokens, and the gradients of three experts over all tokens.
    """
    e, k = config.num_experts, config.num_experts_per_token
    count = tokens.x.shape[0]
    if routing == TO_FEW:
        chosen = tuple(range(min(k + 1, e)))
        return Truth(count, chosen, _dense(params, tokens, count, chosen))
    rows, some = min(64, count), tuple(sorted({0, e // 2, e - 1}))
    by_row = _dense(params, tokens, rows, tuple(range(e)))
    by_expert = _dense(params, tokens, count, some)
    values = {name: by_row[name] for name in ("y", "d_x")}
    return Truth(rows, some, values | {name: by_expert[name] for name in WEIGHTS})


def _dense(params, tokens, rows, chosen):
    """All outputs for the first `rows` tokens if there were no experts but these."""
    chosen = np.array(chosen)
    position = np.full(params["router"].shape[1], -1, np.int32)
    position[chosen] = np.arange(len(chosen))
    few = {name: params[name] if name == "router" else params[name][chosen] for name in params}
    few, x, d_y = jax.tree.map(
        lambda a: jnp.asarray(a, jnp.float32), (few, tokens.x[:rows], tokens.d_y[:rows])
    )
    with jax.default_matmul_precision("highest"):
        outputs = _dense_outputs(few, x, d_y, tokens.expert_ids[:rows], position)
    return jax.tree.map(np.asarray, outputs)


@jax.jit
def _dense_outputs(params, x, d_y, expert_ids, position):
    def forward(params, x):
        probs = jax.nn.softmax(x @ params["router"])
        factors = jnp.take_along_axis(probs, expert_ids, axis=1)
        weights = (params[name] for name in WEIGHTS)
        return dense.compute(x, position[expert_ids], factors, *weights)

    y, pull = jax.vjp(forward, params, x)
    d_params, d_x = pull(d_y)
    return {"y": y, "d_x": d_x, **d_params}


def backends(wanted=None) -> list[str]:
    """The backends to measure: those wanted ("loop,kernel"), or the one that "auto" takes here and
    the plain loop.

    Raises:
      ValueError: there is no such backend.
    """
    names = ["auto", "loop"] if wanted is None else wanted.split(",")
    return list(dict.fromkeys(map(experts.resolve, names)))


def measure(call, *, seconds):
    """(median seconds of a call, its last result): called once or more, until `seconds` are up."""
    taken = []
    while not taken or sum(taken) < seconds:
        outputs = None  # the last call's are freed first: they may be gigabytes
        started = time.monotonic()
        outputs = jax.block_until_ready(call())
        taken.append(time.monotonic() - started)
    return statistics.median(taken), outputs


def contestant(config, params, tokens, expected, *, seconds=1.0):
    """A function for `rounds.compare`: our layer, compiled now; each round is also checked.

    Its Samples hold `error` (`Truth.error`) and `wrong_choices`, tokens with other experts than
    those that they were made for.
    """
    layer = make_layer(config)
    x, d_y = jnp.asarray(tokens.x), jnp.asarray(tokens.d_y)
    call = functools.partial(layer.lower(params, x, d_y).compile(), params, x, d_y)

    def run():
        median, outputs = measure(call, seconds=seconds)
        ids = np.sort(np.asarray(outputs["expert_ids"]), axis=1)
        values = {
            "error": expected.error(expected.pick(outputs)),
            "wrong_choices": int(np.sum(np.any(ids != tokens.expert_ids, axis=1))),
        }
        return rounds_lib.Sample(median, values)

    return run


def is_right(found, name, dtype) -> bool:
    """Whether a contestant was right in every round kept."""
    wrong = found.summary(name, "wrong_choices")
    error = found.summary(name, "error").high
    return error <= TOLERANCE[dtype] and (wrong is None or wrong.high == 0)
