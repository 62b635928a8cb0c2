"""`experts`: what more and smaller experts cost at equal total and active parameters.

A layer of width 2,048 per token in three cuts: 1 of 8 experts of width 2,048, 8 of 64 of 256, 16 of
128 of 128, each forward and backward on 2,048 tokens of d_model 512 that choose at random. The
products are the same in number; what grows is the router, the tokens' copies (one per choice) and
the number of small matrices.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from olmoe_jax import accounting, machine
from olmoe_jax.benchmarking import matmul_peak, moe_work, tables
from olmoe_jax.benchmarking import rounds as rounds_lib

TOKENS, D_MODEL = 2048, 512
CUTS = {8: (1, 2048), 64: (8, 256), 128: (16, 128)}  # experts → chosen, width
PEAK = "peak"


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
            for name in contestants
            if name != PEAK and not moe_work.is_right(found, name, options.dtype)
        ],
        **found.account(),
        "environment": machine.environment(),
    }
    _show(result, configs, backends)
    return result, not result["wrong"]


def _name(backend, experts):
    return f"{backend}, {experts} experts"


def _summary(found, configs, backends):
    """Ratios and rows; ratios without a backend's name are of the first backend."""
    peak = found.summary(PEAK, "flops_per_second")
    rows, ratios = {PEAK: {"seconds": found.summary(PEAK), "flops_per_second": peak}}, {}
    few, *more = configs
    for backend in backends:
        for e, config in configs.items():
            name, flops = _name(backend, e), accounting.moe_flops_per_token(config).training
            rows[name] = {
                "seconds": found.summary(name),
                "share_of_peak": matmul_peak.share(found, name, work=TOKENS * flops, against=PEAK),
                "error": found.summary(name, "error").high,
            }
        for e in more:
            cost = found.speed(_name(backend, few), against=_name(backend, e)).median
            ratios.setdefault(f"ratio_{e}_to_{few}", cost)
            ratios[f"ratio_{e}_to_{few}_{backend}"] = cost
    return ratios | {"contestants": rows}


def _show(result, configs, backends):
    print(
        f"\nexperts: {TOKENS:,} tokens, d_model {D_MODEL}, {result['dtype']}, equal total and "
        "active parameters, forward and backward; median (lowest–highest)"
    )
    few = next(iter(configs))
    rows = [("", "of width", "chosen", "seconds", f"÷ {few} experts", "share of peak", "error")]
    for backend in backends:
        for e, config in configs.items():
            row = result["contestants"][_name(backend, e)]
            cost = result.get(f"ratio_{e}_to_{few}_{backend}", 1.0)
            rows.append((
                _name(backend, e), str(config.d_ff), str(config.num_experts_per_token),
                row["seconds"].text(3), f"{cost:.2f}",
                f"{row['share_of_peak'].median:.0%}", f"{row['error']:.0e}",
            ))  # fmt: skip
    print(tables.table(rows))
    peak = result["contestants"][PEAK]["flops_per_second"].median
    print(f"peak: {peak / 1e9:.0f} GFLOP/s, a square product")
    if result["wrong"]:
        print(f"WRONG: not as `dense` computes it: {'; '.join(result['wrong'])}")
    else:
        print("all values agree with `dense` in float32")
    print(tables.footer(result))
