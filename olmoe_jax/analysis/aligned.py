"""Traces of the same tokens, read side by side."""

import numpy as np

from olmoe_jax.analysis import counts, trace


def check(one, two, *, same_experts=True):
    """Raises ValueError unless two traces are of the same tokens and layers that correspond.

    Args:
      same_experts: number of experts and k must agree, not only the number of layers.
    """
    if one.info.data != two.info.data:
        raise ValueError(
            f"{counts.describe(one.info)} is of data {one.info.data!r}, "
            f"{counts.describe(two.info)} of {two.info.data!r}: record both on the same text, in "
            "the same order"
        )
    if same_experts:
        counts.check_alike([one.info, two.info])
    elif len(one.info.layers) != len(two.info.layers):
        raise ValueError(
            f"{counts.describe(one.info)} has {len(one.info.layers)} MoE layers, "
            f"{counts.describe(two.info)} {len(two.info.layers)}: layers must correspond"
        )


def blocks(one, two, size=65536):
    """Pairs of Blocks of the same tokens, at most `size` each.

    Raises:
      ValueError: input ids differ, or one trace ends first.
    """
    left, right = one.blocks(size), two.blocks(size)
    a = b = None
    while True:
        a, b = _next(a, left), _next(b, right)
        if a is None and b is None:
            return
        if a is None or b is None:
            raise ValueError(
                f"{counts.describe(one.info)} and {counts.describe(two.info)}: one has fewer "
                "tokens; record both on the same text"
            )
        n = min(len(a), len(b))
        head_a, head_b = trace.cut(a, slice(n)), trace.cut(b, slice(n))
        if not np.array_equal(head_a.input_ids, head_b.input_ids):
            raise ValueError(
                f"{counts.describe(one.info)} and {counts.describe(two.info)}: their tokens "
                "differ; record both on the same text, in the same order"
            )
        yield head_a, head_b
        a, b = trace.cut(a, slice(n, None)), trace.cut(b, slice(n, None))


def _next(block, source):
    while block is None or not len(block):
        block = next(source, None)
        if block is None:
            return None
    return block
