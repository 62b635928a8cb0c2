"""Recording: a model and texts → routing traces, in memory or layer by layer.

Both ways call the same compiled layer (`layerwise.apply_layer`) with the same batches, so their
results are the same bits. Resident, all layers' weights are in memory and batches pass through.
Streamed, all tokens pass through one layer after the other: one layer's weights are in memory,
activations lie on disk (`scratch`), and the weights are read once, whatever the number of domains.
"""

import contextlib
import dataclasses
import itertools
import os
import tempfile

import jax
import numpy as np
import tqdm

from olmoe_jax import config as config_lib
from olmoe_jax import generation, machine
from olmoe_jax.analysis import layerwise, running, scratch, suites, trace
from olmoe_jax.analysis import sinks as sinks_lib
from olmoe_jax.analysis import texts as texts_lib
from olmoe_jax.porting import sources

CARRIED_TOKENS = 1 << 20  # whose activations are on disk at a time: 17 GB at OLMoE's width
ROOM = 1.3  # memory of a resident model, relative to its weights
_BATCH_BYTES = 1 << 30  # of a layer's intermediate results, which decides the batch
_MAX_EXPERTS = 32767  # ids are int16


def record(
    model, texts, output=None, *, accumulate=None, dtype="float32", precision="float32",
    tokens_per_batch=None, streamed=None, carried_tokens=CARRIED_TOKENS, scratch_folder=None,
    announce=print,
):  # fmt: skip
    """Runs a model over texts; yields a `sinks.Recorded` for each when it is done.

    Every argument is checked before this returns; the model runs while the result is iterated.

    Args:
      model: directory of any kind that `olmoe_jax.load` takes (of a workdir the newest checkpoint),
        or a `suites.Checkpoint`.
      texts: `texts.Text`s of different domains and one context length.
      output: directory for the traces, one folder per domain (`sinks.trace_folder`). One that is
        there already is not recorded again, an interrupted one is continued. None: none is kept.
      accumulate: function of a TraceInfo that returns an object with `add(block)`; None: nothing
        is accumulated. With an `output` it is fed from the trace, once that is whole.
      dtype: "float32" or "bfloat16", of the computation.
      precision: "float32" or "bfloat16", of the router's product; softmax and top-k are in float32.
        "bfloat16" is what a Hugging Face model in bfloat16 does: several per cent of the choices
        are other ones. Needs nothing of `dtype`, which is "bfloat16" there too.
      tokens_per_batch: computed together, in whole windows; None: by the model's width.
      streamed: read one layer's weights at a time; None: if all of them do not fit in memory.
      carried_tokens: when streamed, tokens that pass through all layers together.
      scratch_folder: of the activations, deleted at the end; None: `{output}.scratch`, without an
        output a temporary one, which no interrupted run finds again.
      announce: called with lines for a person.

    The model is computed dropless (`expert_backend` "auto"), also where training dropped tokens.
    Where its run trained with `data.mask_documents`, a token sees its own document only; weights
    from elsewhere see the whole window, as the released analyses do. Weights that have hashes are
    verified before anything is recorded.

    Raises:
      FileNotFoundError, ValueError: model, texts or settings do not fit each other. OSError: the
        disk is too small for the activations.
    """
    if output is None and accumulate is None:
        raise ValueError("neither output nor accumulate is given: nothing would be kept")
    texts = list(texts)
    job = open_job(
        model, texts, dtype=dtype, precision=precision, tokens_per_batch=tokens_per_batch
    )
    for line in itertools.chain.from_iterable(text.remarks() for text in texts):
        announce(line)
    if streamed is None:
        streamed = too_large(job.weights)
    sinks = [
        sinks_lib.Sink(text, _info(text, job), output, accumulate, job.identity()) for text in texts
    ]
    if scratch_folder is None and output is not None:
        scratch_folder = f"{os.path.expanduser(output).rstrip('/')}.scratch"
    if streamed and not all(sink.is_whole for sink in sinks):
        _check_disk(job, carried_tokens, scratch_folder or tempfile.gettempdir())
        announce(
            f"{job.checkpoint.path}: layer by layer: {job.weights.layer_bytes() / 1e9:.2f} of "
            f"{job.weights.num_bytes() / 1e9:.2f} GB of weights in memory at a time"
        )
    if not all(sink.is_whole for sink in sinks):
        job.weights.verify()
    return _run(job, sinks, carried_tokens if streamed else None, scratch_folder)


def open_job(model, texts, *, dtype="float32", precision="float32", tokens_per_batch=None):
    """The `running.Job` of a model over texts, checked; arguments as of `record`.

    Raises:
      FileNotFoundError, ValueError: model, texts or settings do not fit each other.
    """
    for name, value in (("dtype", dtype), ("precision", precision)):
        if value not in config_lib.DTYPE_NAMES:
            choices = ", ".join(config_lib.DTYPE_NAMES)
            raise ValueError(f"{name} is {value!r}: must be one of {choices}")
    checkpoint = model if isinstance(model, suites.Checkpoint) else suites.one(model)
    source = sources.open_source(checkpoint.path)
    config = dataclasses.replace(
        source.config.model, dtype=dtype, router_dtype=precision, expert_backend="auto", remat=False
    )
    _check_model(config, checkpoint.path)
    _check_texts(texts, config, checkpoint.path)
    return running.Job(
        checkpoint=checkpoint,
        weights=layerwise.Weights(source, config),
        batches=_batches(texts, config, tokens_per_batch),
        state=source.state(),
        mask_documents=source.config.data.mask_documents,
    )


def identity(model, texts, **options) -> list:
    """What decides the traces that `record` makes of a model's texts: JSON values.

    Args:
      model, texts: as of `record`.
      options: of `record`; those that change no trace are passed over.
    """
    texts = list(texts)
    kept = {name: options[name] for name in ("dtype", "precision") if name in options}
    job = open_job(model, texts, **kept)
    infos = [dataclasses.asdict(_info(text, job)) for text in texts]
    return [job.identity()["contents"], infos]


def _check_model(config, path):
    if not config.num_moe_layers:
        raise ValueError(f"{path}: a dense model, which routes nothing; expected a MoE")
    if config.router != "token_choice":
        raise ValueError(
            f"{path}: its router is {config.router}: which tokens an expert takes depends on the "
            "batch, and their number differs; only token_choice can be recorded"
        )
    if config.num_experts > _MAX_EXPERTS:
        raise ValueError(f"{path}: {config.num_experts} experts, at most {_MAX_EXPERTS} are known")


def _check_texts(texts, config, path):
    if not texts:
        raise ValueError("no text is given")
    domains = [text.domain for text in texts]
    if twice := {d for d in domains if domains.count(d) > 1}:
        raise ValueError(f"two texts are of the domain {sorted(twice)[0]!r}: join them")
    lengths = sorted({text.context_length for text in texts})
    if len(lengths) > 1:
        raise ValueError(f"texts have context lengths {lengths}: must be one")
    if lengths[0] > config.max_length:
        raise ValueError(
            f"context_length is {lengths[0]}: {path} takes at most {config.max_length} tokens"
        )
    own = generation.find_tokenizer(path)
    for text in texts:
        if text.largest_id >= config.vocab_size:
            raise ValueError(
                f"domain {text.domain!r} has token {text.largest_id}, {path} knows 0.."
                f"{config.vocab_size - 1}: it was made with another model's tokenizer"
            )
        both = own is not None and text.tokenizer is not None
        if both and not texts_lib.same_tokens(own, text.tokenizer):
            raise ValueError(
                f"domain {text.domain!r} was made with the tokenizer {text.tokenizer.name}, which "
                f"has other tokens than the model's own, {own.name}; use that one"
            )


def _batches(texts, config, tokens_per_batch):
    """All batches, text by text; of one size, so that one program serves them."""
    length = texts[0].context_length
    if tokens_per_batch is None:
        width = 2 * config.d_model + 3 * config.d_ff  # floats of a slot, while experts compute
        row = np.dtype(config.dtype).itemsize * config.num_experts_per_token * width
        tokens_per_batch = _BATCH_BYTES // row
    elif tokens_per_batch < 1:
        raise ValueError(f"tokens_per_batch is {tokens_per_batch}: must be at least 1")
    longest = max(text.num_windows for text in texts)
    size = min(max(1, tokens_per_batch // length), longest)
    return [
        running.Batch(text, index, first, min(size, text.num_windows - first), size)
        for index, text in enumerate(texts)
        for first in range(0, text.num_windows, size)
    ]


def _info(text, job):
    config, checkpoint = job.config, job.checkpoint
    return trace.TraceInfo(
        model=checkpoint.model,
        checkpoint=checkpoint.name,
        step=checkpoint.step,
        train_tokens=checkpoint.tokens,
        domain=text.domain,
        layers=tuple(i for i in range(config.num_layers) if config.is_moe_layer(i)),
        num_experts=config.num_experts,
        num_experts_per_token=config.num_experts_per_token,
        num_tokens=len(text.tokens),
        num_documents=text.num_documents,
        vocab_size=config.vocab_size,
        context_length=text.context_length,
        tokenizer="" if text.tokenizer is None else text.tokenizer.sha256,
        data=text.data,
        precision=config.router_dtype,
    )


def too_large(weights) -> bool:
    """Whether a model's `layerwise.Weights` do not fit where they would be computed with."""
    device = jax.local_devices()[0]
    statistics = None if device.platform == "cpu" else device.memory_stats()
    if statistics and "bytes_limit" in statistics:
        free = statistics["bytes_limit"] - statistics.get("bytes_in_use", 0)
    else:
        free = machine.free_memory()
    return free is not None and ROOM * weights.num_bytes() > free


def _check_disk(job, carried_tokens, where):
    if carried_tokens < 1:
        raise ValueError(f"carried_tokens is {carried_tokens}: must be at least 1")
    config, group = job.config, running.make_groups(job.batches, carried_tokens)[0]
    needed = scratch.num_bytes(
        layers=config.num_moe_layers, tokens=running.num_rows(group) * group[0].text.context_length,
        d_model=config.d_model, k=config.num_experts_per_token, dtype=config.dtype,
    )  # fmt: skip
    machine.check_disk(
        where, needed, "activations", "name another scratch_folder or a smaller carried_tokens"
    )


def _run(job, sinks, carried_tokens, scratch_folder):
    """Computes what is not there yet, streamed if `carried_tokens` is a number; yields a Recorded
    per sink."""
    clock, at = running.Clock(), 0
    with contextlib.ExitStack() as stack:
        starts = [stack.enter_context(sink).open() for sink in sinks]
        pending = [b for b in job.batches if b.first + b.count > starts[b.index]]
        total = sum(b.num_tokens for b in pending)
        bar = tqdm.tqdm(total=total, unit="tok", unit_scale=True, desc="record", disable=None)
        stack.enter_context(bar)
        if carried_tokens is None:
            found = running.resident(job, pending, clock, bar)
        else:
            if scratch_folder is None:
                scratch_folder = stack.enter_context(tempfile.TemporaryDirectory())

            def flush():
                with clock("traces"):
                    for sink in sinks:
                        sink.flush()

            found = running.streamed(
                job, pending, carried_tokens, scratch_folder, clock, bar, flush
            )
        for batch, results in found:
            while at < batch.index:
                yield sinks[at].finish(clock.seconds)
                at += 1
            with clock("traces"):
                sinks[at].add(*running.block(batch, starts[at], results))
        last = [sink.finish(clock.seconds) for sink in sinks[at:]]
        if carried_tokens is not None:
            scratch.remove(scratch_folder)
        yield from last
