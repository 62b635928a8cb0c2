"""`start_up`: fresh processes until `import olmoe_jax` is done, beside `import jax, flax`.

Public names are imported when first used, so the bare import costs next to nothing; what it costs
to have them all is measured apart, beside the libraries that they rest on. Bare Python is the floor
of each. Last comes where the time of the public API goes, package by package (`-X importtime`).
"""

import collections
import pathlib
import re
import subprocess
import sys

from olmoe_jax import machine
from olmoe_jax.benchmarking import rounds as rounds_lib
from olmoe_jax.benchmarking import tables

ROOT = pathlib.Path(__file__).resolve().parents[2]
LIBRARIES, OURS = "import jax, flax", "import olmoe_jax"
BENEATH = "import jax, flax, orbax.checkpoint"
PUBLIC_API = "import olmoe_jax; olmoe_jax.load; olmoe_jax.Transformer"
STARTS = {"bare Python": "pass", **{code: code for code in (LIBRARIES, OURS, BENEATH, PUBLIC_API)}}
STARTS_PER_ROUND = 3  # the fastest counts: a start is short, and easily disturbed
LARGEST = 6  # packages shown


def run(options):
    """The suite; (what --json gets, True: there is nothing to be wrong)."""
    for code in STARTS.values():
        _start(code)  # compiles modules that were never imported, brings files into memory
    found = rounds_lib.compare(
        {name: lambda code=code: _fastest(code) for name, code in STARTS.items()},
        rounds=options.rounds,
    )
    result = {
        "suite": "start_up",
        "ratio_import": found.speed(LIBRARIES, against=OURS).median,
        "ratio_public_api": found.speed(BENEATH, against=PUBLIC_API).median,
        "contestants": {
            name: {
                "seconds": found.summary(name),
                "cpu_seconds": found.summary(name, "cpu_seconds"),
                "peak_anonymous_bytes": found.summary(name, "peak_anonymous_bytes"),
            }
            for name in STARTS
        },
        "public_api_seconds_by_package": seconds_by_package(PUBLIC_API),
        **found.account(),
        "environment": machine.environment(),
    }
    _show(result)
    return result, True


def _start(code):
    return rounds_lib.run_command([sys.executable, "-c", code], cwd=ROOT)


def _fastest(code):
    return min((_start(code) for _ in range(STARTS_PER_ROUND)), key=lambda sample: sample.seconds)


def seconds_by_package(code) -> dict[str, float]:
    """Top-level package → seconds its modules took to import, without what they import; falling.

    Measured once, in a fresh process under `-X importtime`, which makes it slower.
    """
    command = [sys.executable, "-X", "importtime", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    seconds = collections.Counter()
    for line in done.stderr.splitlines():
        if match := re.match(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\w+)", line):
            seconds[match[2]] += int(match[1]) / 1e6
    return dict(seconds.most_common())


def _show(result):
    rows = [("", "seconds", "CPU s", "peak anonymous MB")]
    for name, row in result["contestants"].items():
        peak = row["peak_anonymous_bytes"]
        memory = f"{peak.median / 1e6:.0f}" if peak else "no /proc"
        rows.append((name, row["seconds"].text(3), row["cpu_seconds"].text(2), memory))
    print("\nstart_up: fresh processes; median (lowest–highest) over rounds of the fastest of "
          f"{STARTS_PER_ROUND}\n{tables.table(rows)}")  # fmt: skip
    print(f"seconds, olmoe_jax ÷ jax, flax: {result['ratio_import']:.2f}")
    print(f"seconds, public API ÷ jax, flax, Orbax: {result['ratio_public_api']:.2f}")
    packages = list(result["public_api_seconds_by_package"].items())
    shown = ", ".join(f"{name} {seconds:.2f}" for name, seconds in packages[:LARGEST])
    rest = sum(seconds for _, seconds in packages[LARGEST:])
    print(f"where the public API's seconds go (-X importtime): {shown}, others {rest:.2f}")
    print(tables.footer(result))
