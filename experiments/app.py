"""What every binary does before its own work: flags, one-line errors, --json, joining a cluster.

A binary defines its flags at module level with `absl.flags`, has a `main(argv)` and ends with

    if __name__ == "__main__":
        app.run(main, flags_with_config=True)

A mistake of the user (ValueError, TypeError, FileNotFoundError, any other OSError, Ctrl-C), also
one found while flags are parsed, becomes one line `error: …` on stderr and exit status 2; `--debug`
shows the traceback. JAX is imported only where it is needed.
"""

import atexit
import ctypes
import dataclasses
import difflib
import os
import platform
import re
import shutil
import sys
import tempfile
import traceback
import typing

from absl import app as absl_app
from absl import flags, logging
from ml_collections import config_flags

from olmoe_jax import config as config_lib
from olmoe_jax import files, machine

USER_ERRORS = (ValueError, TypeError, OSError, FloatingPointError, KeyboardInterrupt)
CONFIGS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs")
LONGEST_MESSAGE = 600
HEARTBEAT_SECONDS = 30  # JAX's own 100 s is how long the others would wait for a dead process

_DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of an error.")


def run(main, *, flags_with_config=False, flags_with_json=False, argv=None):
    """Parses flags, calls `main(argv)` and exits; never returns.

    Args:
      main: function of the argument list without flags ([program]); its result is the exit status.
      flags_with_config: add --config=FILE and --config.a.b=value, read by `config()`.
      flags_with_json: add --json=FILE, written by `write_json()`.
      argv: command line with the program first; default sys.argv.
    """
    argv = sys.argv if argv is None else argv
    if flags_with_config:
        text = "Experiment file; --config.a.b=value overrides one field."
        config_flags.DEFINE_config_file("config", None, text, sys_argv=argv)
    if flags_with_json:
        flags.DEFINE_string("json", None, "Also write the result to this file, as JSON.")

    def parse(args):
        try:
            if flags_with_config:
                _check_config_flags(args)
            rest = flags.FLAGS(args)
            if len(rest) > 1:
                raise ValueError(f"unexpected argument {rest[1]!r}: flags are written --name=value")
        except Exception as error:  # a config file is a program: it may raise anything
            _fail(_parse_message(error), debug="--debug" in args)
        if flags.FLAGS["verbosity"].using_default_value:
            flags.FLAGS.verbosity = logging.WARNING  # Orbax and others log every file at INFO
        return rest

    def guarded(args):
        try:
            return main(args)
        except USER_ERRORS as error:
            _fail(message(error), debug=_DEBUG.value)

    absl_app.run(guarded, argv=argv, flags_parser=parse)


def config() -> config_lib.Config:
    """The run's frozen config, from --config and its overrides."""
    return config_lib.from_flags(config_lib.Config, flags.FLAGS.config)


def write_json(result):
    """Writes `result` (a dataclass, dict or list) to the file of --json, whole or not at all.

    Raises:
      ValueError: the result holds NaN or an infinity, which JSON does not have.
    """
    if flags.FLAGS.json is not None:
        files.write_json(flags.FLAGS.json, result, default=_plain)


def in_cluster(environment=os.environ) -> bool:
    """Whether the environment names several processes (by hand, SLURM, Open MPI, TPU pod)."""
    return (
        "JAX_COORDINATOR_ADDRESS" in environment
        or ("SLURM_PROCID" in environment and int(environment.get("SLURM_NTASKS", "1")) > 1)
        or int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1
        or "," in environment.get("TPU_WORKER_HOSTNAMES", "")
        or "MEGASCALE_COORDINATOR_ADDRESS" in environment
    )


def start_distributed() -> bool:
    """Connects this process to the others of a cluster; without one does nothing and says False.

    With JAX_COORDINATOR_ADDRESS processes are started by hand, anywhere; JAX_NUM_PROCESSES and
    JAX_PROCESS_ID (read here, not by JAX) then say which is which. Must come before the first use
    of a device.
    """
    if not in_cluster():
        return False
    import jax

    variables = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    by_hand = {name: int(os.environ[v]) for name, v in variables.items() if v in os.environ}
    jax.distributed.initialize(**by_hand, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    return True


def share_compiled_programs():
    """Lets runs that differ only in their seed be compiled once per process.

    In a folder of this process: machines that share a workdir may have other processors.
    """
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        folder = tempfile.mkdtemp(prefix="olmoe_jax_study_")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def seeds(texts) -> tuple[int, ...] | None:
    """The numbers of a flag --seeds=4,5,6; None if it is not given.

    Raises:
      ValueError: one is not a number from 0 on.
    """
    for text in texts or ():
        if not text.strip().isdecimal():
            raise ValueError(f"--seeds: {text!r} is not a number from 0 on; write --seeds=4,5,6")
    return None if texts is None else tuple(int(text) for text in texts)


def stopped(signal) -> int:
    """Says that a signal ended a study's runs; the exit status."""
    print("stopped; state saved. The same command goes on from there")
    return 128 + signal


def unfinished(plan) -> bool:
    """Says which runs of a study's Plan are still to be made, also to --json; whether any are."""
    if left := plan.remaining:
        count = "1 run is" if len(left) == 1 else f"{len(left)} runs are"
        print(
            f"\n{count} not done yet: {', '.join(f'{arm} {seed}' for arm, seed in left)}\n"
            "left to other processes, or to this command without --arm and --seed; the one that "
            "makes the last writes the report"
        )
        write_json({"study": plan.study.name, "remaining": left})
    return bool(left)


def python() -> str:
    """The running interpreter as a person would type it: relative if it lies below this folder."""
    here = os.path.join(os.getcwd(), "")
    return sys.executable.removeprefix(here) if sys.prefix != sys.base_prefix else "python3"


def tune_allocator() -> bool:
    """Makes glibc's malloc keep large freed blocks; returns whether it did.

    For CPU runs, before JAX starts. By default a block above 32 MB is mapped and unmapped at every
    use, so each train step pays page faults for its large buffers (measured on two Zen 4 cores: a
    gather of 16,384 rows 10.4 → 2.1 ms, a whole fp32 step about 10 % faster). Price: freed memory
    stays with the process; peak memory of that benchmark went from 4.05 to 5.4–6.8 GB, so leave it
    off where memory is short.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    accepted = [libc.mallopt(number, value) == 1 for number, value in machine.MALLOC.values()]
    return all(accepted)


def message(error) -> str:
    """An exception as one line."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        text = str(error) or type(error).__name__
    text = " ".join(text.split())
    if len(text) > LONGEST_MESSAGE:
        text = f"{text[:LONGEST_MESSAGE]} … (all of it with --debug)"
    return text


def _fail(text, *, debug):
    if debug:
        traceback.print_exc()
    print(f"error: {text}", file=sys.stderr, flush=True)
    sys.exit(2)


def _plain(value):
    """What json cannot write: dataclasses, NumPy and JAX arrays and scalars, paths."""
    if dataclasses.is_dataclass(value):
        return dataclasses.asdict(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"--json: {type(value).__name__} has no JSON form")


def _check_config_flags(argv):
    """Refuses a missing experiment file and unknown fields: ml_collections shows tracebacks."""
    if any(re.match(r"-{1,2}(help|helpshort|helpfull|helpxml|\?)$", arg) for arg in argv):
        return
    path = None
    for arg, following in zip(argv[1:], [*argv[2:], None], strict=False):
        name, equals, value = arg.partition("=")
        if name in ("-config", "--config"):
            path = value if equals else following
        elif match := re.match(r"-{1,2}(?:no)?config\.(.+)", name):
            _field_type(match[1])
    known = sorted(name for name in os.listdir(CONFIGS) if re.fullmatch(r"[a-z]\w*\.py", name))
    if path is None:
        raise ValueError(f"--config=FILE is required: experiments/configs has {', '.join(known)}")
    file = path.split(":", 1)[0]
    if not os.path.isfile(file):
        near = difflib.get_close_matches(os.path.basename(file), known, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise FileNotFoundError(f"--config={path}: no such file; in experiments/configs: {hint}")


def _field_type(dotted):
    """Type of the field `a.b` of Config; ValueError that names the nearest if there is none."""
    kind, path = config_lib.Config, "config"
    for name in dotted.split("."):
        if not dataclasses.is_dataclass(kind):
            raise ValueError(f"{path}.{name} does not exist: {path} is one value ({_words(kind)})")
        hints = typing.get_type_hints(kind)
        if name not in hints:
            raise ValueError(config_lib.unknown_field(path, name, kind))
        kind, path = hints[name], f"{path}.{name}"
    return kind


def _words(kind):
    return getattr(kind, "__name__", str(kind)) if not typing.get_args(kind) else str(kind)


def _parse_message(error):
    """One line for whatever flag parsing raised."""
    text = str(error)
    if match := re.match(r"flag --config\.([\w.]+)=(.*?): ", text, re.DOTALL):
        return f"config.{match[1]} is {match[2]!r}: expected {_words(_field_type(match[1]))}"
    if "Error whilst parsing config file" in text:  # ml_collections appends a traceback
        return f"--config: {text.strip().splitlines()[-1]}"
    if isinstance(error, flags.UnrecognizedFlagError):
        return text.replace("Unknown command line flag", "unknown flag", 1)
    if isinstance(error, (flags.Error, *USER_ERRORS)):
        return message(error)
    return f"--config: {type(error).__name__}: {message(error)}"
