"""`upcycle`: a dense model's directory → a MoE checkpoint, streamed, complete or absent."""

import dataclasses
import hashlib
import json
import os
import pathlib
import time

from etils import epath

from olmoe_jax import accounting, checkpoints, generation
from olmoe_jax import config as config_lib
from olmoe_jax.checkpoints import manifest, naming, reading, streamed
from olmoe_jax.porting import port, safetensors, sources, tokenizer_files
from olmoe_jax.upcycling import recipe as recipe_lib
from olmoe_jax.upcycling import states, weights

RESET, CARRY = OPTIMIZER_STATE = ("reset", "carry")
_NEW_FIELDS = (  # of the model, that a recipe sets
    "num_experts", "num_experts_per_token", "num_shared_experts", "moe_every", "d_ff",
    "normalize_expert_weights",
)  # fmt: skip
STATE = f"{naming.RESUME}/{naming.checkpoint_name(0, 0)}"  # in the output


@dataclasses.dataclass(frozen=True, kw_only=True)
class Position:
    """How far the dense model had come, if it was trained here.

    Attributes:
      step: updates that it had made.
      start_step: `data.start_step` of a run that continues its data order, with the batch size and
        the seed of the dense run.
      windows, tokens: of that order which lie before it.
      data_path: the prepared data, as far as the dense run's workdir was found.
    """

    step: int
    start_step: int
    windows: int
    tokens: int
    data_path: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What an upcycling did.

    Attributes:
      path: the directory that is there now.
      config: Config of the upcycled model; its data section continues the dense run's.
      position: Position of the dense model; None where it is not known.
      preserves: how well the new model computes what the dense one did; None: it does not.
      state: step directory with the carried optimizer state, or None.
      total, active: parameters of the upcycled model.
      bytes: written.
      bytes_kept: of them, bytes of the parameters that an interrupted run had already written.
      warnings: lines.
    """

    path: str
    config: config_lib.Config
    position: Position | None
    preserves: str | None
    state: str | None
    total: int
    active: int
    bytes: int
    bytes_kept: int
    seconds: float
    warnings: tuple[str, ...]


def upcycle(input, output, recipe, *, optimizer_state=RESET, announce=print) -> Result:
    """Writes the Mixture of Experts that `recipe` makes of a dense model.

    The output is a directory as `experiments.port_weights` writes it. Its config.json is the dense
    run's with the new architecture, `data.start_step` behind what the dense model has seen, and a
    record `upcycled`. What is interrupted goes on when the same call is made again.

    Args:
      input: a dense model: a directory of any kind that `olmoe_jax.load` takes, or a step directory
        of a run's `resume`.
      output: directory to create.
      recipe: a Recipe.
      optimizer_state: "reset", or "carry": the output also gets `resume/step0-tokens0K`, with which
        `training.initial_optimizer_state` begins: moments follow their weights, new weights have
        none. Needs an input with a train state: a step directory of `resume`, or a workdir (its
        newest is taken).
      announce: called with lines for a person.

    Raises:
      FileNotFoundError, FileExistsError, ValueError: input, output or recipe do not fit; said
        before the output is touched. DamagedError: bytes of the input are not those written.
      OSError: the disk is too small.
    """
    start = time.monotonic()
    output = pathlib.Path(os.path.expanduser(output)).absolute()
    if output.exists():
        raise FileExistsError(f"{output}: is there already; delete it or name another --output")
    if optimizer_state not in OPTIMIZER_STATE:
        choices = ", ".join(OPTIMIZER_STATE)
        raise ValueError(f"optimizer_state is {optimizer_state!r}: must be one of {choices}")
    dense, state = _open(input, carry=optimizer_state == CARRY)
    if output.is_relative_to(os.path.abspath(dense.path)):
        raise ValueError(f"{output}: lies in the input {dense.path}; name another --output")
    model = recipe_lib.moe_config(dense.config.model, recipe, str(dense.path))
    position = position_of(dense.path, dense.config)
    config = _config(dense.config, model, position)
    arrays = dense if state is None else state.trees[states.PARAMS]
    source = weights.Upcycled(arrays, model, recipe)
    total = sum(safetensors.num_bytes(kind, shape) for shape, kind in source.leaves.values())
    extra = states.size(state, config, recipe) if optimizer_state == CARRY else 0
    port.check_disk(output, total + extra)
    kind = arrays.leaves[next(n for n in arrays.leaves if n.endswith("ffn/w_down"))][1]
    warnings = list(recipe_lib.remarks(recipe, dense.config.model, kind))
    if config.losses.load_balancing_weight == 0:
        warnings.append(
            "note: the dense run had losses.load_balancing_weight=0: set one to train this model"
        )
    for line in warnings:
        announce(line)
    _check_hashes(dense, state, announce)
    record = {
        "from": str(dense.path),
        "recipe": dataclasses.asdict(recipe),
        "optimizer_state": optimizer_state,
        "position": position and dataclasses.asdict(position),
    }
    digest = hashlib.sha256(json.dumps(dense.state()).encode()).hexdigest()
    job = {"upcycled": record, "state_of_input": digest}
    content = {"config": dataclasses.asdict(config), "step": None, "upcycled": record}
    writer = streamed.StreamedWriter(
        output,
        source.leaves,
        config_json=json.dumps(content, indent=2) + "\n",
        files={f"{sources.SOURCE}/{name}": data for name, data in dense.files.items()},
        job=job,
    )
    with writer:
        written, nan, _ = port.stream(source, writer, source.leaves, total, description="upcycle")
        if optimizer_state == CARRY:
            begun = output.with_name(output.name + naming.PARTIAL) / STATE
            if not begun.exists():  # whole, as it has its name
                with states.Writer(begun, state, config, recipe, job=job) as target:
                    target.stream("optimizer state")
        writer.finish()
    if nan:
        warnings.append(f"warning: {len(nan)} arrays hold NaN: {', '.join(sorted(nan)[:3])}")
        announce(warnings[-1])
    count = accounting.num_params(model)
    return Result(
        path=str(output), config=config, position=position,
        preserves=recipe_lib.preserves(recipe, dense.config.model),
        state=str(output / STATE) if optimizer_state == CARRY else None,
        total=count.total, active=count.active, bytes=total + extra, bytes_kept=total - written,
        seconds=time.monotonic() - start, warnings=tuple(warnings),
    )  # fmt: skip


def train_flags(result) -> tuple[str, ...]:
    """The flags of `experiments.train` by which the dense run's own experiment file continues from
    `result`: the new architecture, what it starts from and, where it is known, where in the data.
    """
    fields = {"training": ["initial_checkpoint"], "model": _NEW_FIELDS}
    if result.state:
        fields["training"] += ["initial_optimizer_state"]
    if result.position is not None:
        fields["data"] = ["path", "sequence_length", "start_step"]
        fields["training"] += ["batch_size", "seed"]
    config = _starting_from(result.config, result.state or result.path, result.state is not None)
    return tuple(
        f"--config.{section}.{name}={getattr(getattr(config, section), name)}"
        for section, names in fields.items()
        for name in names
    )


def read_config(directory) -> config_lib.Config:
    """The Config of a run that continues from what `upcycle` wrote to `directory`.

    Raises:
      FileNotFoundError, ValueError: it was not written by `upcycle`, or is not finished.
    """
    path = checkpoints.find(directory)
    config = checkpoints.read_config(path)
    if "upcycled" not in _content(path):
        raise ValueError(f"{path}: was not written by experiments.upcycle")
    carried = (path / STATE).is_dir()
    return _starting_from(config, path / STATE if carried else path, carried)


@dataclasses.dataclass(frozen=True)
class _Dense:
    """What `upcycle` needs of a train state that is its input."""

    path: epath.Path
    config: config_lib.Config
    files: dict

    def state(self):
        """What changes when the state does."""
        return [p.read_text() for p in sorted((self.path / manifest.FOLDER).glob("*.json"))]


def _open(input, *, carry):
    """(the dense model, its train state or None)."""
    path = naming.absolute(input)
    whole = states.find(path) if carry or (path / reading.STATE).is_dir() else None
    if whole is not None:
        state = states.State(whole)
        tokenizer = generation.find_tokenizer(whole)
        length = state.config.model.max_length
        files = {} if tokenizer is None else tokenizer_files.make(tokenizer, length)
        return _Dense(state.path, state.config, files), state
    if carry:
        raise ValueError(
            f"{path}: holds no optimizer state: --optimizer_state=carry needs a workdir, or a step "
            "directory of its resume/"
        )
    return sources.open_source(input), None


def _check_hashes(dense, state, announce):
    """Recomputes the input's hashes, where it has any: a copy would make damage look sound."""
    if state is not None:
        return  # done when it was opened
    if sources.has_hashes(dense):
        announce(f"verifying the hashes of {dense.path}")
        sources.verify(dense)


def _content(path):
    return json.loads((epath.Path(path) / reading.CONFIG).read_text())


def position_of(path, config) -> Position | None:
    """Position of the checkpoint at `path`, of Config `config`; None if it was not trained here."""
    path = epath.Path(path)
    if not (path / manifest.FOLDER).is_dir() or not (path / reading.CONFIG).exists():
        return None
    content = _content(path)
    if "ported" in content or "upcycled" in content or type(content.get("step")) is not int:
        return None
    start_step = config.data.start_step + content["step"]
    workdir, data_path = path.parent.parent, None
    try:
        named = json.loads((workdir / reading.CONFIG).read_text())["data_path"]
        data_path = str((workdir / named).resolve())
    except (OSError, ValueError, KeyError, TypeError):
        pass  # a checkpoint that was moved away from its run
    return Position(
        step=content["step"], start_step=start_step,
        windows=start_step * config.training.batch_size,
        tokens=start_step * config.tokens_per_step, data_path=data_path,
    )  # fmt: skip


def _starting_from(config, path, carried):
    """A Config whose run starts from what lies at `path`."""
    training = dataclasses.replace(
        config.training, initial_checkpoint=str(path), initial_optimizer_state=carried
    )
    return dataclasses.replace(config, training=training)


def _config(dense, model, position):
    """The dense run's Config with the new architecture, behind the data that it has seen."""
    data, training = dense.data, dense.training
    if position is not None:
        path = data.path if position.data_path is None else position.data_path
        data = dataclasses.replace(data, path=path, start_step=position.start_step)
    training = dataclasses.replace(training, initial_checkpoint=None, initial_optimizer_state=False)
    return dataclasses.replace(dense, model=model, data=data, training=training)
