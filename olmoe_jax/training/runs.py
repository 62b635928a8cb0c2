"""A run's workdir: its config.json, and whether a config and its data belong to it."""

import contextlib
import dataclasses
import json
import os
import pathlib

import jax

from olmoe_jax import checkpoints, files
from olmoe_jax import config as config_lib
from olmoe_jax.checkpoints import naming
from olmoe_jax.data import pipeline, tokenizer
from olmoe_jax.model import experts
from olmoe_jax.porting import sources
from olmoe_jax.training import machine, metrics

# Fields that a run may change when it resumes: they do not change what is computed at a step.
_MAY_CHANGE = (
    "config.training.log_interval",
    "config.training.stop_on_nan",
    "config.training.spike_factor",
    "config.checkpoint.full_state_at",
    "config.data.workers",
    "config.mesh.",
)
_LOCK = ".train.lock"  # not .lock: a study locks that file around a whole run
# In config.json, and what is wrong where they differ.
_DATA_IDENTITY = {"tokenizer_sha256": "made with another tokenizer", "data_sha256": "other data"}


def read_config(workdir):
    """The (Config, whole config.json as a dict) of a run.

    Raises:
      FileNotFoundError: the workdir holds no run.
      ValueError: config.json is not of this version.
    """
    path = pathlib.Path(workdir) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; {workdir} is not the workdir of a run")
    try:
        content = json.loads(path.read_text())
        return config_lib.from_saved(content["config"]), content
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a config.json of this version ({error})") from error


def differences(found, config) -> list[str]:
    """Fields whose difference means that one run cannot continue the other: ["config.a.b: 1 != 2"].

    Left out is what a run may change when it resumes.
    """
    return [d for d in config_lib.differences(found, config) if not d.startswith(_MAY_CHANGE)]


def check_workdir_name(workdir):
    """Raises ValueError where no checkpoints can be written to a directory of this name."""
    if "://" in str(workdir):
        raise ValueError(f"--workdir={workdir}: a bucket must be mounted; name a directory")
    # Orbax takes them for patterns: writing fails, or reading finds other files, or none.
    if found := sorted(set("*?[\\") & set(os.path.abspath(workdir))):
        raise ValueError(
            f"--workdir={workdir}: no checkpoints can be kept where a path has a {found[0]}; "
            "name another"
        )


@contextlib.contextmanager
def alone(workdir):
    """Keeps other processes from training in a workdir, which is made, until the end of the block.

    The lock goes with the process, however it ends.

    Raises:
      ValueError: another process is at it.
    """
    if jax.process_index():
        yield
        return
    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / _LOCK, "w") as lock:
        try:
            mine = files.try_lock(lock)
        except OSError:
            mine = True  # a file system without locks
        if not mine:
            raise ValueError(
                f"{workdir}: another process is training in it; wait for it, or name another "
                "--workdir"
            )
        yield


def _has_state(workdir):
    """Whether a run goes on from a train state of its own, and so no longer reads what it began
    from."""
    return bool(naming.list_complete(pathlib.Path(workdir) / naming.RESUME))


def check_workdir(workdir, config, announce):
    """Refuses a workdir that holds a run of another configuration, and says which fields differ.

    `training.num_steps` may grow; where the learning rate depends on it, that is announced. Data
    may lie elsewhere now (`check_data` tells whether they are the same), and what the run began
    from is not compared once it has a state of its own.

    Returns:
      `config`, with `training.initial_*` of the run that is there.
    """
    if not (pathlib.Path(workdir) / "config.json").is_file():
        return config
    found, content = read_config(workdir)
    if _has_state(workdir):
        began = found.training.initial_checkpoint
        if config.training.initial_checkpoint not in (None, began):
            announce(
                "note: the run resumes; config.training.initial_checkpoint, which was "
                f"{began!r}, is not read any more"
            )
        training = dataclasses.replace(
            config.training,
            initial_checkpoint=began,
            initial_optimizer_state=found.training.initial_optimizer_state,
        )
        config = dataclasses.replace(config, training=training)
    differ = differences(found, config)
    if "data_sha256" in content and config.data.path != "embedded":
        elsewhere = ("config.data.path:", "config.data.tokenizer:")
        differ = [d for d in differ if not d.startswith(elsewhere)]
    steps = "config.training.num_steps:"
    if config.training.num_steps > found.training.num_steps:
        if any(d.startswith(steps) for d in differ) and (
            config.optimizer.schedule != "constant" and not config.optimizer.decay_tokens
        ):
            announce(
                f"note: the learning rate now falls until step {config.training.num_steps}, not "
                f"{found.training.num_steps}; config.optimizer.decay_tokens fixes its end"
            )
        differ = [d for d in differ if not d.startswith(steps)]
    if differ:
        raise ValueError(
            f"{workdir} holds a run of another configuration (its value != this one): "
            f"{'; '.join(differ)}. Name another --workdir, or run it as it was"
        )
    return config


def check_data(workdir, data):
    """Refuses data other than those that the run in `workdir` began with.

    What an older config.json does not say is not compared.

    Raises:
      ValueError: the tokenizer or the data differ.
    """
    if not (pathlib.Path(workdir) / "config.json").is_file():
        return
    _, content = read_config(workdir)
    for name, now in identity(data).items():
        if (began := content.get(name, now)) != now:
            raise ValueError(
                f"{data.path}: {_DATA_IDENTITY[name]} than the run in {workdir} began with "
                f"({name} {began[:12]}… then, {now[:12]}… now): name those as config.data.path "
                f"(then: {content.get('data_path')}), or another --workdir"
            )


def identity(data) -> dict[str, str]:
    """What in config.json tells PreparedData apart, wherever they lie."""
    return {"tokenizer_sha256": data.info.tokenizer_sha256, "data_sha256": data.sha256}


def recorded_identity(workdir) -> dict[str, str]:
    """`identity` of the data that the run in a workdir reads; without what it does not say, empty
    if there is no run."""
    try:
        content = json.loads((pathlib.Path(workdir) / "config.json").read_text())
        return {name: content[name] for name in _DATA_IDENTITY if name in content}
    except (OSError, ValueError, TypeError):
        return {}


def open_data(config, workdir, announce):
    """The prepared data of a run, checked against its config.

    Raises:
      FileNotFoundError, ValueError: it is absent or incomplete, or its tokenizer, vocabulary or
        window length is not the config's.
    """
    path, length = os.path.expanduser(config.data.path), config.data.sequence_length
    if path == "embedded":
        if (named := config.data.tokenizer) is not None:  # before the corpus is built
            _check_vocabulary(tokenizer.load(named).vocab_size, named, config)
        path = pipeline.ensure_embedded(
            pathlib.Path(workdir) / "data",
            sequence_length=length,
            vocab_size=config.model.vocab_size,
            tokenizer=config.data.tokenizer,
            announce=announce,
        )
    data = pipeline.open(path, tokenizer=config.data.tokenizer, sequence_length=length)
    _check_vocabulary(data.info.vocab_size, path, config)
    for split in ("train", "validation"):
        if not data.num_windows(split):
            raise ValueError(f"config.data.path {path}: its {split} split holds no window")
    return data


def _check_vocabulary(size, source, config):
    if size > config.model.vocab_size:
        raise ValueError(
            f"config.model.vocab_size is {config.model.vocab_size}: the tokenizer of {source} has "
            f"{size} entries; set config.model.vocab_size to at least that"
        )


def check_initial_checkpoint(config, workdir):
    """Raises FileNotFoundError or ValueError where training.initial_checkpoint cannot be read,
    unless the run in `workdir` no longer reads it."""
    source = config.training.initial_checkpoint
    if source is None or _has_state(workdir):
        return
    if config.training.initial_optimizer_state:
        checkpoints.read_config(checkpoints.find_state(source))
    elif sources.kind_of(source) not in sources.FOREIGN:
        checkpoints.read_config(checkpoints.find(source))
    else:
        sources.Foreign(os.path.expanduser(source))


def check_initial_tokenizer(config, workdir, data):
    """Refuses data of another tokenizer than that of the run which training.initial_checkpoint is
    of: its embedding would mean other tokens.

    Raises:
      ValueError: the tokenizers differ. Weights of no run, or of one that is gone, pass.
    """
    source = config.training.initial_checkpoint
    if source is None or _has_state(workdir):
        return
    path = pathlib.Path(os.path.realpath(os.path.expanduser(source)))
    for folder in (path, path.parent.parent):  # WORKDIR, WORKDIR/checkpoints/NAME
        theirs = recorded_identity(folder).get("tokenizer_sha256")
        if theirs not in (None, data.info.tokenizer_sha256):
            raise ValueError(
                f"config.training.initial_checkpoint is {source}: the run in {folder} had another "
                f"tokenizer (sha256 {theirs[:12]}…) than {data.path} "
                f"({data.info.tokenizer_sha256[:12]}…): prepare the data with that one"
            )


def finished_record(workdir, config):
    """The last record of a run that has made all its steps and kept the last checkpoint; else
    None."""
    kept = checkpoints.list_checkpoints(workdir)
    if not kept or kept[-1][0] < config.training.num_steps:
        return None
    if not (pathlib.Path(workdir) / "metrics.jsonl").is_file():
        return None
    record = None
    for record in metrics.read(workdir):  # noqa: B007 (the last one is wanted)
        pass
    return record if record is not None and record["step"] == config.training.num_steps else None


def expert_backend(model_config):
    """Name of the expert backend that a model runs with here; None if it has no experts."""
    return experts.resolve(model_config.expert_backend) if model_config.num_experts else None


def write_config(workdir, config, *, data, peak):
    """Writes config.json: the config, where its data lies, and what it runs on."""
    if jax.process_index():
        return
    workdir, data_path = pathlib.Path(workdir).resolve(), pathlib.Path(data.path).resolve()
    workdir.mkdir(parents=True, exist_ok=True)
    if data_path.is_relative_to(workdir):  # the workdir can then be moved
        data_path = data_path.relative_to(workdir)
    content = {
        "config": dataclasses.asdict(config),
        "data_path": str(data_path),
        **identity(data),
        "expert_backend": expert_backend(config.model),
        "peak_flops_per_device": peak[0],
        "peak_flops_source": peak[1],
        "environment": machine.environment(),
    }
    files.write_text(workdir / "config.json", json.dumps(content, indent=2) + "\n")
