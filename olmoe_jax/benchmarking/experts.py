"""`experts`: what more and smaller experts cost at equal total and active parameters.

A layer of width 2,048 per token in three cuts: 1 of 8 experts of width 2,048, 8 of 64 of 256, 16 of
128 of 128, each forward and backward on 2,048 tokens of d_model 512 that choose at random. The
products are the same in number; what grows is the router, the tokens' copies (one per choice) and
the number of small matrices.

Beside the layers run the plain loop's products alone, in shapes that equal loads would have, one
after the other on operands that lie ready: what would be left of its layer if nothing else took
time. Where these cost more for smaller matrices, no loop over XLA's products can be flat.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from olmoe_jax import accounting, machine
from olmoe_jax.benchmarking import matmul_peak, moe_work, tables
from olmoe_jax.benchmarking import rounds as rounds_lib
from olmoe_jax.grouped_matmul import loop

TOKENS, D_MODEL = 2048, 512
CUTS = {8: (1, 2048), 64: (8, 256), 128: (16, 128)}  # experts → chosen, width
PEAK, PRODUCTS = "peak", "products alone"


def run(options):
    """The suite; (what --json gets, whether all values agree with `dense`).

    Raises:
      ValueError: no such --expert_backend.
    """
    backends = moe_work.backends(options.expert_backend)
    configs = {
        e: moe_work.make_config(
            dtype=options.dtype, d_model=D_MODEL, d_ff=f, num_experts=e, num_experts_per_token=k
        )
        for e, (k, f) in CUTS.items()
    }
    contestants = {PEAK: functools.partial(matmul_peak.sample, options.dtype)}
    contestants |= {_name(PRODUCTS, e): _products_alone(config) for e, config in configs.items()}
    for e, config in configs.items():
        params = moe_work.make_params(config)
        tokens = moe_work.make_tokens(
            config, params["router"], count=TOKENS, routing=moe_work.BALANCED
        )
        params = jax.tree.map(jnp.asarray, params)
        expected = moe_work.truth(config, params, tokens, routing=moe_work.BALANCED)
        for backend in backends:
            one = dataclasses.replace(config, expert_backend=backend)
            contestants[_name(backend, e)] = moe_work.contestant(one, params, tokens, expected)
    for name, contest in contestants.items():
        if name != PEAK:
            contest()  # the first use of memory is slower
    found = rounds_lib.compare(contestants, rounds=options.rounds)
    result = {
        "suite": "experts",
        "dtype": options.dtype,
        **_summary(found, configs, backends),
        "wrong": [
            name
            for name in (_name(backend, e) for backend in backends for e in configs)
            if not moe_work.is_right(found, name, options.dtype)
        ],
        **found.account(),
        "environment": machine.environment(),
    }
    _show(result, configs, backends)
    return result, not result["wrong"]


def _name(backend, experts):
    return f"{backend}, {experts} experts"


def _ratio(kind, experts, few):
    """The key of a ratio in the result."""
    return f"ratio_{experts}_to_{few}_{kind.replace(' ', '_')}"


def _products_alone(config):
    """A function for `rounds.compare`: a layer's products, each on what the one before gave."""
    c, dtype = config, jnp.dtype(config.dtype)
    rows = TOKENS * c.num_experts_per_token // c.num_experts

    def step(_, operands):
        x, w = operands
        h = loop.dot(x, w).astype(dtype)
        x = loop.dot_transposed(h, w).astype(dtype)  # as an input's gradient
        w = loop.dot(loop.transposed(x), h).astype(dtype)  # as a weight's
        return x, w

    @jax.jit
    def chain(x, w):
        return lax.fori_loop(0, c.num_experts * len(moe_work.WEIGHTS), step, (x, w))

    # Zeros: any other numbers would overflow or vanish along the chain.
    operands = jnp.zeros((rows, c.d_model), dtype), jnp.zeros((c.d_model, c.d_ff), dtype)
    call = functools.partial(chain.lower(*operands).compile(), *operands)
    return lambda: rounds_lib.Sample(moe_work.measure(call, seconds=1.0)[0])


def _summary(found, configs, backends):
    """Ratios and rows; ratios without a backend's name are of the first backend."""
    peak = found.summary(PEAK, "flops_per_second")
    rows, ratios = {PEAK: {"seconds": found.summary(PEAK), "flops_per_second": peak}}, {}
    few, *more = configs
    for kind in (*backends, PRODUCTS):
        for e, config in configs.items():
            name, flops = _name(kind, e), accounting.moe_flops_per_token(config)
            work = flops.training - (flops.router if kind == PRODUCTS else 0)
            error = found.summary(name, "error")
            rows[name] = {
                "seconds": found.summary(name),
                "share_of_peak": matmul_peak.share(found, name, work=TOKENS * work, against=PEAK),
                "error": error and error.high,
            }
        for e in more:
            cost = found.speed(_name(kind, few), against=_name(kind, e)).median
            ratios.setdefault(f"ratio_{e}_to_{few}", cost)
            ratios[_ratio(kind, e, few)] = cost
    return ratios | {"contestants": rows}


def _show(result, configs, backends):
    print(
        f"\nexperts: {TOKENS:,} tokens, d_model {D_MODEL}, {result['dtype']}, equal total and "
        "active parameters, forward and backward; median (lowest–highest)"
    )
    few = next(iter(configs))
    rows = [("", "of width", "chosen", "seconds", f"÷ {few} experts", "share of peak", "error")]
    for kind in (*backends, PRODUCTS):
        for e, config in configs.items():
            row = result["contestants"][_name(kind, e)]
            cost = result.get(_ratio(kind, e, few), 1.0)
            rows.append((
                _name(kind, e), str(config.d_ff), str(config.num_experts_per_token),
                row["seconds"].text(3), f"{cost:.2f}", f"{row['share_of_peak'].median:.0%}",
                "–" if row["error"] is None else f"{row['error']:.0e}",
            ))  # fmt: skip
    print(tables.table(rows))
    peak = result["contestants"][PEAK]["flops_per_second"].median
    print(f"peak: {peak / 1e9:.0f} GFLOP/s, a square product")
    if result["wrong"]:
        print(f"WRONG: not as `dense` computes it: {'; '.join(result['wrong'])}")
    else:
        print("all values agree with `dense` in float32")
    print(tables.footer(result))
