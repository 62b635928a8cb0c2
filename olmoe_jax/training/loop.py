"""The training loop: from a config and a workdir to checkpoints and metrics; the same call resumes.

At step N, in this order: if N is a checkpoint step, validate and save the parameters after N
updates; then make update N. So the record of step N in metrics.jsonl speaks of one set of
parameters throughout, the run's last record holds validation only, and a resumed run begins by
redoing what step N began with.
"""

import dataclasses
import functools
import os
import pathlib
import signal
import time

import jax
import numpy as np

from olmoe_jax import accounting, checkpoints, loading, sharding
from olmoe_jax.data import pipeline
from olmoe_jax.model import transformer
from olmoe_jax.training import machine, preflight, profiling, runs, validation
from olmoe_jax.training import metrics as metrics_lib
from olmoe_jax.training import step as step_lib


@dataclasses.dataclass(frozen=True)
class Result:
    """How a call of `train` ended.

    Attributes:
      step: updates made so far.
      finished: whether all of config.training.num_steps were made.
      signal: the signal that stopped it, or None.
      record: the last record written, or None.
    """

    step: int
    finished: bool
    signal: int | None = None
    record: dict | None = None


class _StopRequest:
    """Context manager that turns SIGTERM and Ctrl-C into a flag read between steps.

    A second Ctrl-C interrupts at once. With several processes SIGTERM is left to JAX's preemption
    service, through which all agree on the step, and Ctrl-C interrupts.
    """

    def __init__(self):
        self.received = None
        self._previous = {}

    def __enter__(self):
        if jax.process_count() > 1:
            return self
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._previous[number] = signal.signal(number, self._handle)
            except ValueError:  # not the main thread: the caller handles signals
                break
        return self

    def __exit__(self, *exc):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def at(self, step) -> bool:
        """Whether to stop before update `step`."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils  # only with several processes

            if multihost_utils.reached_preemption_sync_point(step):
                self.received = self.received or signal.SIGTERM
                return True
            return False
        return self.received is not None


def _check_batch(config, mesh):
    """Raises ValueError where the mesh or the load-balancing group does not divide the batch."""
    shards = sharding.batch_shards(mesh)
    micro = config.training.batch_size // config.training.micro_batches
    if micro % shards:
        raise ValueError(
            f"config.training.batch_size is {config.training.batch_size}: a micro-batch "
            f"({micro} sequences) must be divisible by mesh data × fsdp × expert ({shards})"
        )
    group = config.losses.load_balancing_group
    if group and (micro // shards) % group:
        raise ValueError(
            f"config.losses.load_balancing_group is {group}: must divide a micro-batch's "
            f"share on each device ({micro} / {shards} = {micro // shards} sequences); "
            "0 takes the whole batch"
        )


def _rows_of_this_process(batch_sharding, batch_size):
    """The slice of the global batch that holds all rows of this process's devices."""
    indices = batch_sharding.addressable_devices_indices_map((batch_size,)).values()
    bounds = [index[0].indices(batch_size) for index in indices]
    return slice(min(b[0] for b in bounds), max(b[1] for b in bounds))


def _abstract_state(config, mesh):
    shapes = jax.eval_shape(
        functools.partial(step_lib.init_state, config=config), jax.random.key(0)
    )
    shardings = sharding.state_shardings(shapes, mesh)
    return jax.tree.map(
        lambda s, placed: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=placed), shapes, shardings
    )


def _starting_state(config, abstract, saver):
    """(state, step, how it was obtained)."""
    if (restored := saver.restore_state(abstract)) is not None:
        return restored, int(restored["step"]), f"resumed at step {int(restored['step'])}"
    shardings = jax.tree.map(lambda a: a.sharding, abstract)
    init = jax.jit(functools.partial(step_lib.init_state, config=config), out_shardings=shardings)
    state = init(jax.random.key(config.training.seed))
    source = config.training.initial_checkpoint
    if source is None:
        return state, 0, "initialised"
    if config.training.initial_optimizer_state:
        other = checkpoints.read_state(source, abstract, config.model)
        state |= {"params": other["params"], "opt_state": other["opt_state"]}
    else:
        state["params"] = loading.load_params(
            source, config.model, sharding=shardings["params"], dtype="float32"
        )
    return state, 0, f"started from {source}"


def train(
    config,
    workdir,
    *,
    dry_run=False,
    allow_full_disk=False,
    profile=None,
    devices=None,
    announce=print,
) -> Result:
    """Trains until config.training.num_steps updates are made, resuming what `workdir` holds.

    Args:
      config: a Config.
      workdir: the run's directory; created if absent.
      dry_run: stop after printing what the run will take.
      allow_full_disk: start even if the checkpoints will not fit.
      profile: directory for a JAX profiler trace of a few steps (see `profiling`), or None.
      devices: what the mesh is made of; default all.
      announce: called with each line meant for a person.
    Raises:
      ValueError, FileNotFoundError: the config, the data and the workdir do not fit together,
        before any work; or a loss that is not finite, if training.stop_on_nan.
    """
    runs.check_workdir_name(workdir)
    workdir = pathlib.Path(os.path.expanduser(workdir))
    if jax.process_index():
        announce = lambda line: None  # noqa: E731
    profiler = profiling.Profile(profile, announce)
    mesh = sharding.make_mesh(config.mesh, devices)
    _check_batch(config, mesh)
    model = transformer.Transformer(config.model, routing_group=config.losses.load_balancing_group)
    abstract = _abstract_state(config, mesh)
    config = runs.check_workdir(workdir, config, announce)
    if (record := runs.finished_record(workdir, config)) is not None:
        announce(f"finished: {workdir} holds all {config.training.num_steps} steps")
        profiler.close()
        return Result(step=config.training.num_steps, finished=True, record=record)
    runs.check_initial_checkpoint(config, workdir)
    if not dry_run or config.data.path != "embedded":  # which a dry run does not build
        data = runs.open_data(config, workdir, announce)
        runs.check_data(workdir, data)
        runs.check_initial_tokenizer(config, workdir, data)
    plan = preflight.plan(config, workdir, mesh=mesh)
    announce(preflight.report(plan))
    preflight.check(plan, allow_full_disk=allow_full_disk)
    if dry_run:
        return Result(step=0, finished=False)
    peak = machine.measure_peak_flops(config.model.dtype)
    with (
        jax.set_mesh(mesh),
        runs.alone(workdir),
        checkpoints.Checkpoints(workdir, config) as saver,
        _StopRequest() as stop,
    ):
        state, step, how = _starting_state(config, abstract, saver)
        announce(f"{how}: {workdir}")
        if step_lib.needs_counting_pass(config):
            announce(
                "note: the load-balancing loss over the whole batch first counts over all "
                "micro-batches: "
                f"one more forward pass per step, {_counting_share(config):.0%} more FLOPs "
                "(perf/counting_pass_share); config.losses.load_balancing_group avoids it"
            )
        runs.write_config(workdir, config, data=data, peak=peak)
        with metrics_lib.MetricsWriter(workdir, step) as writer:
            return _loop(
                config, state, step, model=model, mesh=mesh, data=data, saver=saver, writer=writer,
                stop=stop, peak=peak, profiler=profiler, announce=announce,
            )  # fmt: skip


def _counting_share(config):
    """FLOPs of the counting pass relative to the rest of a step; it needs no head."""
    flops = accounting.flops_per_token(config.model, config.data.sequence_length)
    head = 2 * config.model.padded_vocab_size * config.model.d_model
    return (flops.forward - head) / flops.training


def _loop(
    config, state, first, *, model, mesh, data, saver, writer, stop, peak, profiler, announce
):  # fmt: skip
    batch_sharding, batch_size = sharding.batch_sharding(mesh), config.training.batch_size
    rows = _rows_of_this_process(batch_sharding, batch_size)
    state_shardings = jax.tree.map(lambda x: x.sharding, state)
    train_step = jax.jit(
        functools.partial(step_lib.train_step, model=model, config=config),
        donate_argnums=0,
        out_shardings=(state_shardings, None),
    )
    validator = validation.Validator(model, config, data, mesh)
    batches = pipeline.Batches(
        data, batch_size=batch_size, seed=config.training.seed, start_step=config.data.start_step,
        rows=rows, workers=config.data.workers,
        mask_repetitive_windows=config.data.mask_repetitive_windows,
    )  # fmt: skip
    recorder = _Recorder(config, writer, peak, mesh.size, announce)
    num_steps, interval = config.training.num_steps, config.checkpoint.interval
    source = iter(batches.iterate(first))
    step = first
    try:
        while True:
            extra = {}
            if step % interval == 0 or step == num_steps:
                recorder.flush()
                started = time.monotonic()
                extra |= validator.measure(state["params"])
                saving = time.monotonic()
                saver.save_params(step, state["params"])
                if step > first or step == 0:
                    saver.save_state(step, state)
                extra["perf/validation_seconds"] = saving - started
                extra["perf/checkpoint_seconds"] = time.monotonic() - saving
                recorder.pause(time.monotonic() - started)
            if step == num_steps:
                recorder.add(step, None, extra)
                break
            if stop.at(step):
                recorder.flush()  # first: a loss that is not finite must not become a state
                if step % interval or step == first:
                    saver.save_state(step, state)
                saver.wait()
                return Result(step=step, finished=False, signal=stop.received, record=recorder.last)
            batch = sharding.place_batch(
                next(source), batch_sharding, names=step_lib.training_fields(config),
                batch_size=batch_size, first_row=rows.start,
            )  # fmt: skip
            train_step = profiler.compile(train_step, state, batch)
            profiler.before(step - first)
            state, metrics = train_step(state, batch)
            profiler.after(step - first, metrics)
            recorder.add(step, metrics, extra)
            step += 1
    except BaseException:
        recorder.discard()
        raise
    finally:
        profiler.close()
    recorder.flush()
    saver.wait()
    return Result(step=step, finished=True, record=recorder.last)


class _Recorder:
    """Turns device metrics into records, one step late so that the devices never wait for the
    host."""

    def __init__(self, config, writer, peak, num_devices, announce):
        self.last = None
        self._config, self._writer, self._peak, self._announce = config, writer, peak, announce
        self._devices = num_devices
        self._pending = None
        self._spikes = metrics_lib.SpikeDetector(config.training.spike_factor)
        self._flops_per_token = accounting.flops_per_token(
            config.model, config.data.sequence_length
        ).training
        self._backend = runs.expert_backend(config.model)
        self._moe_layers = [
            i for i in range(config.model.num_layers) if config.model.is_moe_layer(i)
        ]
        self._counting_share = (
            _counting_share(config) if step_lib.needs_counting_pass(config) else None
        )
        self._clock, self._paused = time.monotonic(), 0.0
        self._progress = metrics_lib.Progress(config.training.num_steps)

    def pause(self, seconds):
        """Takes time spent on something else than steps out of the throughput."""
        self._paused += seconds

    def add(self, step, metrics, extra):
        """Queues the metrics of `step`; writes those of the step before."""
        self.flush()
        self._pending = (step, metrics, extra)

    def discard(self):
        """Forgets the queued step: the run is failing."""
        self._pending = None
        self._progress.close()

    def flush(self):
        """Writes the queued step, waiting for the device."""
        if self._pending is None:
            return
        (step, metrics, extra), self._pending = self._pending, None
        record, problem = dict(extra), None
        if metrics is not None:
            metrics = jax.device_get(metrics)
            now = time.monotonic()
            seconds, self._clock, self._paused = (
                max(now - self._clock - self._paused, 1e-9),
                now,
                0.0,
            )
            record |= self._train_record(metrics, seconds)
            problem = self._spikes.check(
                step, float(metrics["loss"]), float(metrics["gradient_norm"]),
                metrics["layer_rms"], metrics["layer_gradient_norms"],
            )  # fmt: skip
        final = metrics is None
        if final or extra or problem or step % self._config.training.log_interval == 0:
            if problem:
                record["train/problem"] = problem
            self._writer.write(step, record)
            self.last = {"step": step, **record}
            self._progress.show(step, record)
        if final:
            self._progress.close()
        if problem:
            self._announce(problem)
            if (
                self._config.training.stop_on_nan
                and not np.isfinite([metrics["loss"], metrics["gradient_norm"]]).all()
            ):
                raise FloatingPointError(f"{problem}; stopped (config.training.stop_on_nan)")

    def _train_record(self, metrics, seconds):
        rate = self._config.tokens_per_step / seconds
        record = {
            "train/loss": metrics["loss"],
            "train/learning_rate": metrics["learning_rate"],
            "train/gradient_norm": metrics["gradient_norm"],
            "perf/tokens_per_second": rate,
            "perf/step_seconds": seconds,
            "perf/mfu": rate * self._flops_per_token / (self._peak[0] * self._devices),
        }
        record |= {
            f"gradient_norm/{name}": norm for name, norm in metrics["gradient_norms"].items()
        }
        for layer, (rms, norm) in enumerate(
            zip(metrics["layer_rms"], metrics["layer_gradient_norms"], strict=True)
        ):
            record[f"layers/{layer:02d}/rms"] = rms
            record[f"layers/{layer:02d}/gradient_norm"] = norm
        if self._counting_share is not None:
            record["perf/counting_pass_share"] = self._counting_share
        if "load" in metrics:
            record["train/load_balancing_loss"] = metrics["load_balancing_loss"]
            record["train/router_z_loss"] = metrics["router_z_loss"]
            record["router/expert_backend"] = self._backend
            record |= metrics_lib.router_metrics(metrics["load"], layers=self._moe_layers)
        return {k: v if isinstance(v, (str, int)) else float(v) for k, v in record.items()}
