"""`matmul_peak`: the most FLOP/s that a square matrix product reaches here, ours and torch's.

What every share of peak in the other suites divides by: they run `sample` as one contestant of each
round, so that a share compares two figures taken within seconds of each other. A square product of
2,048 is what a matrix library does best; batches of small ones, which is what experts are, stay
below it.
"""

import functools
import pathlib
import time

import jax
import jax.numpy as jnp

from olmoe_jax import machine
from olmoe_jax.benchmarking import rounds as rounds_lib
from olmoe_jax.benchmarking import tables, workers

SIZE = 2048
ACCELERATOR_SIZE = 8192  # smaller ones do not fill it
SECONDS = 0.5
DTYPES = ("float32", "bfloat16")
PEER = pathlib.Path(__file__).parent / "peers" / "matmul.py"


def flops(size=None) -> int:
    """Of one product of two square matrices; without a size, of what `sample` runs."""
    return 2 * (size or _size()) ** 3


def measure(dtype, *, size=None, seconds=None) -> float:
    """FLOP/s of the fastest square product within `seconds` (SECONDS), on jax.devices()[0].

    Args:
      dtype: "float32" or "bfloat16", of the operands; sums are float32.
      size: rows and columns; default 2,048 on a CPU, 8,192 elsewhere.
    """
    size, seconds = size or _size(), SECONDS if seconds is None else seconds
    multiply, x, y = _product(dtype, size)
    best, begun = float("inf"), time.monotonic()
    while best == float("inf") or time.monotonic() - begun < seconds:
        started = time.monotonic()
        multiply(x, y).block_until_ready()
        best = min(best, time.monotonic() - started)
    return flops(size) / best


def sample(dtype) -> rounds_lib.Sample:
    """`measure` as a contestant of `rounds.compare`: the seconds of the fastest product."""
    reached = measure(dtype)
    return rounds_lib.Sample(flops() / reached, {"flops_per_second": reached})


def share(rounds, name, *, work, against) -> rounds_lib.Summary:
    """Share of the peak that a contestant reached, round by round.

    Args:
      rounds: rounds.Rounds.
      name: a contestant.
      work: its FLOPs in the seconds of a sample.
      against: the contestant that was `sample`.
    """
    return rounds.speed(name, against=against).times(work / flops())


@functools.cache
def _product(dtype, size):
    """(compiled product, two operands); once per process."""
    keys = jax.random.split(jax.random.key(0))
    x, y = (jax.random.normal(key, (size, size), dtype) for key in keys)

    # XLA of jax 0.10 rounds to bfloat16 at half the speed of leaving the sums as they are.
    def multiply(x, y):
        return jnp.matmul(x, y, preferred_element_type=jnp.float32)

    multiply = jax.jit(multiply).lower(x, y).compile()
    multiply(x, y).block_until_ready()
    return multiply, x, y


def _size():
    return SIZE if jax.devices()[0].platform == "cpu" else ACCELERATOR_SIZE


def run(options):
    """The suite; (what --json gets, True: there is nothing to be wrong)."""
    with workers.Worker.peer(options, PEER, allocator_tuned=options.allocator_tuned) as peer:
        contestants = {}
        for dtype in DTYPES:
            contestants[f"ours {dtype}"] = functools.partial(sample, dtype)
            if peer is not None:
                contestants[f"torch {dtype}"] = functools.partial(_ask, peer, dtype)
        for contest in contestants.values():
            contest()  # compiles, warms up
        found = rounds_lib.compare(contestants, rounds=options.rounds)
        result = {
            "suite": "matmul_peak",
            "size": _size(),
            "contestants": {
                name: {
                    "seconds": found.summary(name),
                    "flops_per_second": found.summary(name, "flops_per_second"),
                }
                for name in contestants
            },
        }
        if peer is not None:
            for dtype in DTYPES:
                speed = found.speed(f"ours {dtype}", against=f"torch {dtype}")
                result[f"ratio_{dtype}"] = speed.median
            result["peer"] = peer.ask(do="describe")
        result |= found.account() | {"environment": machine.environment()}
    _show(result)
    return result, True


def _ask(peer, dtype):
    answer = peer.ask(
        do="measure", dtype=dtype, size=_size(), seconds=SECONDS, device=workers.torch_device()
    )
    return rounds_lib.Sample(answer["seconds"], {"flops_per_second": flops() / answer["seconds"]})


def _show(result):
    rows = [("", "GFLOP/s", "ours ÷ torch")]
    for name, row in result["contestants"].items():
        speed = row["flops_per_second"]
        ratio = result.get(f"ratio_{name.removeprefix('ours ')}")
        rows.append((name, speed.times(1e-9).text(0), "" if ratio is None else f"{ratio:.2f}"))
    size = result["size"]
    print(
        f"\nmatmul_peak: best {size} × {size} product within {SECONDS} s; median (lowest–highest)"
    )
    print(tables.table(rows))
    if "peer" in result:
        print(f"torch {result['peer']['torch']}, {result['peer']['threads']} threads")
    else:
        print("no peer: --peer_python names an environment that has torch")
    print(tables.footer(result))
