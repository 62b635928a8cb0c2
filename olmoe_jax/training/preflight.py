"""What a run will take, said before its first step, and refused where it cannot fit."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np

from olmoe_jax import accounting, losses, sharding
from olmoe_jax import machine as machine_lib
from olmoe_jax.checkpoints import naming
from olmoe_jax.model import transformer
from olmoe_jax.training import machine, metrics

# Of the peak. The run of OLMoE-1B-7B: 23,600 tokens/s on an H100, 19 %; small models on two CPU
# cores: 10 to 20 %.
ASSUMED_UTILISATION = 0.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run takes, from where it stands to its end.

    Attributes:
      workdir: the run's directory.
      params: accounting.Parameters of the model.
      tokens_per_step, flops_per_step: of one update over all devices; FLOPs as MFU counts them.
      first_step, num_steps: updates made already, and in all.
      num_devices: of the mesh, over all processes.
      peak: FLOP/s of one device, and peak_source where the figure comes from.
      seconds: estimate of what remains, at ASSUMED_UTILISATION of the peak.
      memory: accounting.Memory, estimate for one device.
      device_memory: bytes that one device has (on CPU: its part of what is free); None if unknown.
      num_checkpoints, num_states: checkpoints and train states still to be written and kept.
      checkpoint_bytes, state_bytes: of each one.
      free_disk: bytes free where the workdir is; None if unknown (an object store).
    """

    workdir: str
    params: accounting.Parameters
    tokens_per_step: int
    flops_per_step: int
    first_step: int
    num_steps: int
    num_devices: int
    peak: float
    peak_source: str
    seconds: float
    memory: accounting.Memory
    device_memory: int | None
    num_checkpoints: int
    num_states: int
    checkpoint_bytes: int
    state_bytes: int
    free_disk: int | None

    @property
    def disk(self) -> int:
        """Bytes that are still to be written and kept."""
        return self.num_checkpoints * self.checkpoint_bytes + self.num_states * self.state_bytes

    @property
    def fixed_memory(self) -> int:
        """The certain part of `memory`: parameters, moments, gradients, compute-dtype weights."""
        return self.memory.state + self.memory.gradients + self.memory.weights


def plan(config, workdir, *, mesh, peak=None) -> Plan:
    """The Plan of a run as it stands in `workdir`: what is there already is not counted again.

    Args:
      config: a Config.
      workdir: need not exist.
      mesh: the mesh that it runs on.
      peak: (FLOP/s of one device, source); default: looked up or measured (half a second).
    """
    peak, source = machine.measure_peak_flops(config.model.dtype) if peak is None else peak
    first, num_checkpoints, num_states = _remaining(config, workdir)
    whole = accounting.disk(config)
    flops = accounting.flops_per_token(config.model, config.data.sequence_length).training
    flops *= config.tokens_per_step
    rate = peak * mesh.size * ASSUMED_UTILISATION
    return Plan(
        workdir=str(workdir),
        params=accounting.num_params(config.model),
        tokens_per_step=config.tokens_per_step,
        flops_per_step=flops,
        first_step=first,
        num_steps=config.training.num_steps,
        num_devices=mesh.size,
        peak=peak,
        peak_source=source,
        seconds=(config.training.num_steps - first) * flops / rate,
        memory=accounting.step_memory(
            config,
            param_shards=_param_shards(config.model, mesh),
            batch_shards=sharding.batch_shards(mesh),
            logits_chunk=losses.CHUNK_TOKENS,
        ),
        device_memory=device_memory(mesh),
        num_checkpoints=num_checkpoints,
        num_states=num_states,
        checkpoint_bytes=whole.one_checkpoint,
        state_bytes=whole.one_state,
        free_disk=machine_lib.free_disk(workdir),
    )


def report(plan) -> str:
    """The plan in a few lines for a person."""
    p = plan
    steps = p.num_steps - p.first_step
    resumed = f" (from step {p.first_step:,})" if p.first_step else ""
    memory = (
        f"about {size(p.memory.total)} per device: {size(p.memory.state)} parameters and moments, "
    )
    memory += f"{size(p.memory.gradients)} gradients, {size(p.memory.activations)} activations"
    if p.device_memory is not None:
        memory += f"; it has {size(p.device_memory)}"
        memory += "" if p.memory.total <= p.device_memory else " — LIKELY TOO LITTLE"
    free = "" if p.free_disk is None else f"; {size(p.free_disk)} free"
    lines = {
        "parameters": f"{p.params.total:,}, of which {p.params.active:,} meet each token",
        "work": f"{steps:,} steps{resumed} of {p.tokens_per_step:,} tokens, together "
                f"{steps * p.tokens_per_step:,}; {si(p.flops_per_step)}FLOP per step, "
                f"{si(steps * p.flops_per_step)}FLOP together",
        "time": f"about {metrics.duration(p.seconds)}, an estimate: {ASSUMED_UTILISATION:.0%} of "
                f"{p.num_devices} × {si(p.peak)}FLOP/s ({p.peak_source})",
        "memory": f"{memory} (estimate)",
        "disk": f"{size(p.disk)} to write and keep{free}: "
                f"{p.num_checkpoints:,} checkpoints of {size(p.checkpoint_bytes)}, "
                f"{p.num_states:,} train states of {size(p.state_bytes)}",
    }  # fmt: skip
    return "\n".join(f"{name:10s} {text}" for name, text in lines.items())


def check(plan, *, allow_full_disk=False):
    """Refuses a run that cannot fit.

    Memory is refused for what is certain (parameters, moments, gradients), not for the estimate of
    activations, which `report` marks.

    Raises:
      ValueError: one line with what is needed, what there is and which fields change it.
    """
    if plan.device_memory is not None and plan.fixed_memory > plan.device_memory:
        raise ValueError(
            f"parameters, moments and gradients take {size(plan.fixed_memory)} on each device, "
            f"which has {size(plan.device_memory)}: take a smaller config.model, or split it over "
            f"more devices (config.mesh.fsdp, config.mesh.expert)"
        )
    if plan.free_disk is not None and plan.disk > plan.free_disk and not allow_full_disk:
        raise ValueError(
            f"{plan.workdir}: {plan.num_checkpoints:,} checkpoints of "
            f"{size(plan.checkpoint_bytes)} and {plan.num_states:,} train states of "
            f"{size(plan.state_bytes)} take {size(plan.disk)}, {size(plan.free_disk)} are free: "
            f"raise config.checkpoint.interval, set config.checkpoint.dtype=bfloat16, name another "
            f"--workdir, or pass --allow_full_disk"
        )


def device_memory(mesh) -> int | None:
    """Bytes of memory of one device of the mesh; None if the backend does not say.

    CPU devices share the machine: each gets an equal part of what is free now.
    """
    local = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    if local[0].platform != "cpu":
        return (local[0].memory_stats() or {}).get("bytes_limit")
    free = machine_lib.free_memory()
    return None if free is None else free // len(local)


def size(num_bytes) -> str:
    """Bytes in decimal units.

    >>> size(999), size(27_676_647_424), size(1.5e15)
    ('999 B', '27.7 GB', '1,500 TB')
    """
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{_three(num_bytes / factor)} {unit}"
    return f"{num_bytes} B"


def si(value) -> str:
    """A number with three digits and a metric prefix, for a unit to follow.

    >>> si(7_692_103_680 * 4_194_304) + "FLOP"
    '32.3 PFLOP'
    """
    for prefix, factor in (
        ("Y", 1e24),
        ("Z", 1e21),
        ("E", 1e18),
        ("P", 1e15),
        ("T", 1e12),
        ("G", 1e9),
        ("M", 1e6),
    ):
        if value >= factor:
            return f"{_three(value / factor)} {prefix}"
    return f"{value:,.0f} "


def _three(value):
    """Three digits, or all of those before the point."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


def _remaining(config, workdir):
    """(updates made, checkpoints to write, train states to write and keep beside those there)."""
    steps, interval = config.training.num_steps, config.checkpoint.interval
    kept = {step for step, _ in naming.list_checkpoints(workdir)}
    states = {step for step, _ in naming.list_complete(os.path.join(str(workdir), naming.RESUME))}
    first = max(states, default=0)
    if first >= steps:
        return steps, 0, 0
    planned = {*range(0, steps + 1, interval), steps}
    whole = accounting.disk(config)
    # While one is being written, the oldest is still there.
    num_states = max(1, whole.states // whole.one_state - len(states))
    return first, len(planned - kept), num_states


def _param_shards(model_config, mesh):
    """How many times smaller a device's share of the parameters is than the whole."""
    model = transformer.Transformer(model_config)
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    )
    placed = sharding.parameter_shardings(shapes, mesh)
    whole, share = 0, 0
    for leaf, where in zip(jax.tree.leaves(shapes), jax.tree.leaves(placed), strict=True):
        whole += leaf.size
        share += int(np.prod(where.shard_shape(leaf.shape)))
    return whole / share
