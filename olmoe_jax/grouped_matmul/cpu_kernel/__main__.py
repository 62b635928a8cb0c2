"""Builds the compiled kernel and says so in a line. Optional: always exits 0."""

import time

from olmoe_jax.grouped_matmul import cpu_kernel
from olmoe_jax.grouped_matmul.cpu_kernel import build


def main():
    start = time.monotonic()
    try:
        path = build.build()
    except (OSError, ValueError) as error:
        print(f"compiled kernel: not built, the plain JAX loop is used instead: {error}")
        return
    if reason := cpu_kernel.missing():
        print(f"compiled kernel: {reason}")
        return
    have = [name for name in cpu_kernel.INSTRUCTIONS if cpu_kernel.supported(name)]
    print(f"compiled kernel: {path.name} for {', '.join(have)} ({time.monotonic() - start:.0f} s)")


if __name__ == "__main__":
    main()
