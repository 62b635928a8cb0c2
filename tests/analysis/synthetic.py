"""Small traces for the tests of analyses: random, and with a planted specialist."""

import numpy as np

from olmoe_jax.analysis import analyses, counting, trace


def random_ids(rng, tokens, layers, experts, k):
    """int16 [tokens, layers, k]: sets drawn at random, in random order."""
    return rng.random((tokens, layers, experts)).argsort(-1)[..., :k].astype(np.int16)


def make_trace(
    *, seed=0, tokens=600, layers=(1, 4), experts=7, k=3, documents=23, vocab=29, ids=None,
    weights=True, missing=0.0, **info,
):  # fmt: skip
    """A trace of random choices, or of `ids`; `missing`: share of places without an expert."""
    rng = np.random.default_rng(seed)
    if ids is None:
        ids = random_ids(rng, tokens, len(layers), experts, k)
    ids = np.where(rng.random(ids.shape) < missing, -1, ids).astype(np.int16)
    # empty places stand last, as weights fall
    ids = np.take_along_axis(ids, np.argsort(ids < 0, axis=-1, kind="stable"), -1)
    tokens = len(ids)
    words = np.minimum(rng.pareto(1, tokens) * 2, vocab - 1).astype(np.int32)
    falling = np.sort(rng.random(ids.shape), axis=-1)[..., ::-1] / ids.shape[-1]
    block = trace.Block(
        expert_ids=ids,
        weights=falling.astype(np.float32) if weights else None,
        input_ids=words,
        predicted_ids=rng.integers(0, vocab, tokens).astype(np.int32),
        next_ids=np.append(words[1:], -1).astype(np.int32),
        documents=np.sort(rng.integers(0, documents, tokens)).astype(np.int32),
    )
    info = trace.TraceInfo(
        **{"model": "m", "domain": "books", "data": "d"} | info, layers=layers,
        num_experts=experts, num_experts_per_token=ids.shape[-1], num_tokens=tokens,
        num_documents=documents, vocab_size=vocab,
    )  # fmt: skip
    return trace.MemoryTrace(info, block)


def plant(ids, layer, expert, share, seed=0):
    """The same ids, where a share of the tokens that lack the expert gets it as first choice."""
    rng = np.random.default_rng(seed)
    ids = ids.copy()
    chosen = (rng.random(len(ids)) < share) & ~(ids[:, layer] == expert).any(-1)
    ids[chosen, layer, 0] = expert
    return ids


def recordings(*, steps=(10, 20, 40), domains=("books", "code"), layers=(1, 4), experts=7, k=3):
    """Recordings of checkpoints that come nearer and nearer to the last, on the same tokens; of the
    second domain, expert 2 of the first layer is the specialist."""
    rng, last = np.random.default_rng(5), {}
    for i, domain in enumerate(domains):
        ids = random_ids(np.random.default_rng(i), 600, len(layers), experts, k)
        last[domain] = plant(ids, 0, 2, 0.8) if i == 1 else ids
    found = []
    for step in steps:
        traces = {}
        for i, (domain, ids) in enumerate(last.items()):
            other = random_ids(rng, len(ids), len(layers), experts, k)
            settled = rng.random((len(ids), 1, 1)) < step / steps[-1]
            traces[domain] = make_trace(
                seed=i, layers=layers, experts=experts, k=k, ids=np.where(settled, ids, other),
                domain=domain, data=f"text {i}", checkpoint=f"step{step}", step=step,
                train_tokens=64 * step,
            )  # fmt: skip
        parts = {domain: counting.count(one) for domain, one in traces.items()}
        found.append(analyses.Recording(parts, traces))
    return found
