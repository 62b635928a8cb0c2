"""`layers`: what more layers cost before the first step: compile time, and memory of the step.

The train step of `work` with 2 and with 32 layers, traced, lowered and compiled each time from
empty caches; nothing is run. The layers are one scanned body, so 32 should compile in little more
time than 2. Memory is what XLA will hold at once (arguments + temporaries + results that reuse no
argument), against `accounting.step_bytes`: the tensors that the step cannot do without.
"""

import contextlib
import functools
import time

import jax

from olmoe_jax import accounting, machine
from olmoe_jax.benchmarking import rounds as rounds_lib
from olmoe_jax.benchmarking import tables, work
from olmoe_jax.model import experts

FEW, MANY = 2, 32


def run(options):
    """The suite; (what --json gets, True: no value is computed).

    Raises:
      ValueError: no such --expert_backend.
    """
    backend = experts.resolve(options.expert_backend or "auto")
    configs = {
        count: work.config(dtype=options.dtype, expert_backend=backend, num_layers=count)
        for count in (FEW, MANY)
    }
    memory = {}
    contestants = {
        _name(count): functools.partial(_compile, config, memory)
        for count, config in configs.items()
    }
    with _no_compilation_cache():
        contestants[_name(FEW)]()  # imports, and what XLA sets up once
        found = rounds_lib.compare(
            contestants, rounds=options.rounds, prepare=lambda name: jax.clear_caches()
        )
    result = {
        "suite": "layers",
        "dtype": options.dtype,
        "expert_backend": backend,
        f"ratio_compile_{MANY}_to_{FEW}": found.speed(_name(FEW), against=_name(MANY)).median,
        **_memory_ratios(configs, memory, options.dtype),
        "contestants": {
            _name(count): {
                "seconds": found.summary(_name(count)),
                "trace_seconds": found.summary(_name(count), "trace_seconds"),
                "compile_seconds": found.summary(_name(count), "compile_seconds"),
                "memory": memory[count],
                "needed": accounting.step_bytes(config, state_dtype=options.dtype),
            }
            for count, config in configs.items()
        },
        **found.account(),
        "environment": machine.environment(),
    }
    _show(result)
    return result, True


def _name(count):
    return f"{count} layers"


@contextlib.contextmanager
def _no_compilation_cache():
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def _compile(config, memory):
    """A contestant; leaves the step's bytes in memory[layers]."""
    begun = time.monotonic()
    lowered = work.lower(config)
    traced = time.monotonic()
    compiled = lowered.compile()
    finished = time.monotonic()
    memory[config.model.num_layers] = work.memory(compiled)
    values = {"trace_seconds": traced - begun, "compile_seconds": finished - traced}
    return rounds_lib.Sample(finished - begun, values)


def _memory_ratios(configs, memory, dtype):
    used = {count: sum(memory[count].values()) for count in configs}
    needed = {n: accounting.step_bytes(c, state_dtype=dtype).total for n, c in configs.items()}
    ratios = {f"ratio_memory_{n}_layers": used[n] / needed[n] for n in configs}
    return {
        "ratio_memory": max(ratios.values()),
        **ratios,
        "ratio_memory_per_layer": (used[MANY] - used[FEW]) / (needed[MANY] - needed[FEW]),
    }


def _show(result):
    print(
        f"\nlayers: the train step of work A, {result['dtype']}, experts: "
        f"{result['expert_backend']}; median (lowest–highest)"
    )
    rows = [("", "seconds", "trace, lower", "compile", "GB", "needed GB", "÷ needed")]
    for count in (FEW, MANY):
        row = result["contestants"][_name(count)]
        rows.append((
            _name(count), row["seconds"].text(), row["trace_seconds"].text(),
            row["compile_seconds"].text(), f"{sum(row['memory'].values()) / 1e9:.2f}",
            f"{row['needed'].total / 1e9:.2f}", f"{result[f'ratio_memory_{count}_layers']:.2f}",
        ))  # fmt: skip
    print(tables.table(rows))
    compile_ratio = result[f"ratio_compile_{MANY}_to_{FEW}"]
    print(
        f"{MANY} layers compile in {compile_ratio:.2f} of the time of {FEW}; "
        f"a layer takes {result['ratio_memory_per_layer']:.2f} of the bytes that it needs"
    )
    needed = result["contestants"][_name(MANY)]["needed"]
    print(
        f"needed by {MANY} layers, GB: parameters {needed.parameters / 1e9:.2f}, gradients "
        f"{needed.gradients / 1e9:.2f}, moments {needed.moments / 1e9:.2f}, activations "
        f"{needed.activations / 1e9:.2f}"
    )
    print(tables.footer(result))
