"""The two ways through a model: all layers at hand, or one at a time past all tokens."""

import contextlib
import dataclasses
import hashlib
import json
import time
import typing

import jax
import numpy as np

from olmoe_jax.analysis import layerwise, scratch, suites, texts, trace


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """Windows first..first + count of a text; the rest of its `size` rows are padding."""

    text: texts.Text
    index: int  # of the text
    first: int
    count: int
    size: int

    @property
    def identity(self):
        """What decides what its rows hold: JSON values."""
        return [self.text.data, self.first, self.count, self.size]

    @property
    def num_tokens(self):
        """Without padding."""
        length = self.text.context_length
        return min(self.count * length, len(self.text.tokens) - self.first * length)

    def arrays(self):
        """(int32 tokens, bool real, int32 next_ids), each [size, length]."""
        tokens, real = self.text.windows(self.first, self.first + self.size)
        next_ids = np.full(real.shape, -1, np.int32)
        found = self.text.next_ids(self.first, self.first + self.count)
        next_ids.reshape(-1)[: len(found)] = found
        return tokens, real, next_ids

    def documents(self):
        """int32 [size, length]: the document of every token, -1 behind the end of the text."""
        length = self.text.context_length
        out = np.full(self.size * length, -1, np.int32)
        found = self.text.documents[self.first * length : (self.first + self.size) * length]
        out[: len(found)] = found
        return out.reshape(self.size, length)


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be computed: `state` is what changes when the model's files do; `mask_documents`
    whether a token sees its own document only, as in the model's training."""

    checkpoint: suites.Checkpoint
    weights: layerwise.Weights
    batches: list[Batch]
    state: list
    mask_documents: bool

    @property
    def config(self):
        return self.weights.config

    def segment_ids(self, batch):
        """Within which attention stays in a Batch; None: everywhere."""
        return batch.documents() if self.mask_documents else None

    def identity(self):
        """What decides the activations of a batch, beside the batch: JSON values."""
        content = [self.state, dataclasses.asdict(self.config)]
        digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        return {"model": str(self.checkpoint.path), "contents": digest}


class Clock:
    """Seconds by what was done."""

    def __init__(self):
        self.seconds = dict.fromkeys(("weights", "layers", "head", "scratch", "traces"), 0.0)

    @contextlib.contextmanager
    def __call__(self, name):
        """Times a block."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] += time.monotonic() - begun


def num_rows(batches):
    """Rows of a group: windows and padding."""
    return len(batches) * batches[0].size


def resident(job, batches, clock, bar):
    """(batch, Results) of every batch, with all weights in memory."""
    if not batches:
        return
    config, weights, layers = job.config, job.weights, range(job.config.num_layers)
    with clock("weights"):
        table, head = weights.embedding(), weights.head()
        params, shared = [weights.layer(i) for i in layers], weights.shared_experts()
    for batch in batches:
        tokens, real, next_ids = batch.arrays()
        segments = job.segment_ids(batch)
        with clock("layers"):
            x, chosen = layerwise.embed(table, tokens, config), []
            for i in layers:
                x, choices = layerwise.apply_layer(
                    params[i], x, real, segments, shared, config=config,
                    is_moe=config.is_moe_layer(i),
                )  # fmt: skip
                chosen.append(jax.device_get(choices))
                bar.update(batch.num_tokens / len(layers))
        chosen = [c for c in chosen if c is not None]
        ids, probs, ties = (np.stack(arrays) for arrays in zip(*chosen, strict=True))
        with clock("head"):
            predicted = jax.device_get(layerwise.apply_head(*head, x, next_ids, config=config))
        yield batch, Results(ids.astype(np.int16), probs, ties, *predicted)


def make_groups(batches, carried_tokens):
    """Consecutive batches that pass through the layers together."""
    count = max(1, carried_tokens // max(1, num_rows(batches[:1]) * _length(batches)))
    return [batches[i : i + count] for i in range(0, len(batches), count)]


def _length(batches):
    return batches[0].text.context_length


def _resumed(job, pending, folder):
    """The batches whose activations an interrupted run left in `folder`; [] if they are of no use.

    Some may be done since: the traces grow while activations are turned into results.
    """
    parts = scratch.parts(folder, job.identity())
    known = {tuple(b.identity): b for b in job.batches} if parts else {}
    kept = [known.get(tuple(part)) for part in parts]
    if None in kept:
        return []
    wanted = set(pending)
    missing = [b for b in kept if b in wanted]
    return kept if missing and missing == pending[: len(missing)] else []


def streamed(job, pending, carried_tokens, folder, clock, bar, flush):
    """(batch, Results) of the pending batches, with one layer's weights in memory.

    Args:
      flush: called when the activations of a group are about to be overwritten.
    """
    if not pending:
        return
    config, weights = job.config, job.weights
    first, wanted = _resumed(job, pending, folder), set(pending)
    rest = [b for b in pending if b not in set(first)] if first else pending
    groups = [first] if first else []
    for group in groups + (make_groups(rest, carried_tokens) if rest else []):
        left = [i for i, b in enumerate(group) if b in wanted]
        size, length = group[0].size, _length(group)
        files = scratch.Scratch(
            folder, job.identity(), [b.identity for b in group], rows=num_rows(group),
            length=length, layers=config.num_moe_layers, k=config.num_experts_per_token,
            d_model=config.d_model, dtype=config.dtype,
        )  # fmt: skip
        with files:
            _all_layers(job, group, files, clock, bar)
            with clock("weights"):
                head = weights.head()
            for i in left:
                rows = (i * size, (i + 1) * size)
                with clock("scratch"):
                    x = files.read_activations(config.num_layers, *rows)
                    choices = files.read_choices(*rows)
                with clock("head"):
                    found = layerwise.apply_head(*head, x, group[i].arrays()[2], config=config)
                    predicted = jax.device_get(found)
                yield group[i], Results(*choices, *predicted)
            del head
        flush()


def _all_layers(job, group, files, clock, bar):
    """Takes the batches of a group through the layers that `files` does not hold yet."""
    config, weights, size = job.config, job.weights, group[0].size
    count, moe_layer = config.num_layers, 0
    share = sum(b.num_tokens for b in group) / count
    bar.update(share * files.layer)
    table = None
    for layer in range(count):
        is_moe = config.is_moe_layer(layer)
        moe_layer += is_moe
        if layer < files.layer:
            continue
        params = None  # the last layer's go before the next layer's come
        bar.set_postfix_str(f"layer {layer + 1}/{count}")
        with clock("weights"):
            table = weights.embedding() if layer == 0 else None
            params, shared = weights.layer(layer), weights.shared_experts()
        for i, batch in enumerate(group):
            if layer == files.layer and i < files.batch:
                bar.update(batch.num_tokens / count)
                continue
            tokens, real, _ = batch.arrays()
            with clock("scratch"):
                if layer == 0:
                    x = layerwise.embed(table, tokens, config)
                else:
                    x = files.read_activations(layer, i * size, (i + 1) * size)
            with clock("layers"):
                x, choices = layerwise.apply_layer(
                    params, x, real, job.segment_ids(batch), shared, config=config, is_moe=is_moe
                )
                x, choices = jax.device_get((x, choices))
            with clock("scratch"):
                files.write_activations(layer + 1, i * size, x)
                if is_moe:
                    files.write_choices(moe_layer - 1, i * size, choices)
                files.mark(layer, i + 1)
            bar.update(batch.num_tokens / count)
        with clock("scratch"):
            files.mark(layer + 1, 0, now=True)


class Results(typing.NamedTuple):
    """Of one batch.

    Attributes:
      expert_ids, weights: int16 and float32 [MoE layers, size, length, k].
      near_ties: int32 [MoE layers, size].
      predicted_ids, losses: int32 and float32 [size, length].
    """

    expert_ids: np.ndarray
    weights: np.ndarray
    near_ties: np.ndarray
    predicted_ids: np.ndarray
    losses: np.ndarray


def block(batch, start, results):
    """(Block, near-ties per layer) of a batch, from window number `start` of its text on."""
    text, length = batch.text, batch.text.context_length
    skip = max(0, start - batch.first)
    first, stop = skip * length, batch.num_tokens
    place = slice(batch.first * length + first, batch.first * length + stop)

    def by_token(array):
        """[layers, size, length, k] → [tokens, layers, k]."""
        layers, *_, k = array.shape
        return np.ascontiguousarray(array.reshape(layers, -1, k)[:, first:stop].swapaxes(0, 1))

    return trace.Block(
        expert_ids=by_token(results.expert_ids),
        weights=by_token(results.weights),
        input_ids=np.asarray(text.tokens[place]),
        predicted_ids=results.predicted_ids.reshape(-1)[first:stop],
        next_ids=text.next_ids(batch.first, batch.first + batch.count)[first:],
        documents=np.asarray(text.documents[place]),
        losses=results.losses.reshape(-1)[first:stop],
    ), results.near_ties[:, skip : batch.count].sum(axis=1)
