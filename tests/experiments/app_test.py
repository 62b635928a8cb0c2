import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from experiments import app

ROOT = pathlib.Path(app.__file__).parents[1]

# A binary. Its configs: "good" and what a word behind the file name makes of it.
BINARY = """
import sys
from absl import flags
from experiments import app

flags.DEFINE_string("action", "", "What main does.")

def main(argv):
    config = app.config()
    if flags.FLAGS.action == "show":
        print(config.model.d_ff, config.checkpoint.full_state_at, config.model.remat)
    elif flags.FLAGS.action == "nan":
        app.write_json({"loss": float("nan")})
    elif flags.FLAGS.action == "json":
        app.write_json({"d_ff": config.model.d_ff})
    elif flags.FLAGS.action == "log":
        from absl import logging
        logging.info("chatter")
        logging.warning("alarm")
    elif flags.FLAGS.action == "status":
        return 5
    elif flags.FLAGS.action:
        raise eval(flags.FLAGS.action)

app.run(main, flags_with_config=True, flags_with_json=True)
"""
CONFIG = """
from olmoe_jax import config

def get_config(word=""):
    if word == "broken":
        return no_such_name
    model = config.ModelConfig(num_experts_per_token=65 if word == "invalid" else 8)
    losses = config.LossesConfig(load_balancing_group=4)
    return config.to_flags(config.Config(model=model, losses=losses))
"""
# Imports once, then forks for each command line: a fresh interpreter for each would take a second.
SERVER = """
import json, os, sys, tempfile, traceback
from experiments import app
binary, runs = json.load(sys.stdin)
out = []
for arguments in runs:
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        if (child := os.fork()) == 0:
            os.dup2(stdout.fileno(), 1)
            os.dup2(stderr.fileno(), 2)
            sys.argv = ["binary", *arguments]
            try:
                exec(compile(binary, "binary", "exec"), {"__name__": "__main__"})
            except SystemExit as exit:
                status = exit.code or 0
            except BaseException:
                status = 1
                traceback.print_exc()
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)  # without a slow farewell from JAX
        _, status = os.waitpid(child, 0)
        stdout.seek(0), stderr.seek(0)
        texts = stdout.read().decode(), stderr.read().decode()
        out.append([os.waitstatus_to_exitcode(status), *texts])
json.dump(out, sys.stdout)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs BINARY on CONFIG with each list of arguments: [(status, stdout, stderr), …]."""
    config = tmp_path_factory.mktemp("configs") / "good.py"
    config.write_text(CONFIG)

    def run_all(*command_lines, config_flag=f"--config={config}"):
        lines = [[config_flag + word, *flags] for word, *flags in command_lines]
        done = subprocess.run(
            [sys.executable, "-c", SERVER], input=json.dumps([BINARY, lines]), cwd=ROOT,
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return json.loads(done.stdout)

    return run_all


# (word behind the config's name, flags …) → part of the line.
MISTAKES = {
    ("", "--config.model.dff=3"): "config.model.dff does not exist: the nearest field is config.m",
    ("", "--config.modle.d_ff=3"): "config.modle does not exist: the nearest field is config.model",
    ("", "--config.model.d_ff.x=3"): "config.model.d_ff.x does not exist: config.model.d_ff is",
    ("", "--config.model.d_ff=3.5"): "config.model.d_ff is '3.5': expected int",
    ("", "--config.optimizer.eps=tiny"): "config.optimizer.eps is 'tiny': expected float",
    ("", "--config.model.remat=7"): "config.model.remat is '7': expected bool",
    ("", "--config.checkpoint.full_state_at=(1.5,)"): "full_state_at[0] is 1.5: expected int",
    ("", "--config.model={'d_ff': 3}"): "config.model: missing",
    ("", "--config.model={'d_ff'"): "config.model is",
    ("", "--config.model.num_experts=4"): "num_experts_per_token is 8: must lie in 1..model",
    ("", "--config.training.batch_size=6"): "load_balancing_group is 4: must divide a micro-batch",
    ("", "--acton=show"): "unknown flag 'acton'. Did you mean: action",
    ("", "stray"): "unexpected argument 'stray'",
    (":invalid",): "config.model.num_experts_per_token is 65",
    (":broken",): "--config: NameError: name 'no_such_name' is not defined",
    ("x",): "no such file; in experiments/configs",
    ("", "--action=ValueError('a\\n b')"): "error: a b\n",
    ("", "--action=TypeError('wrong kind')"): "error: wrong kind\n",
    ("", "--action=FileNotFoundError(2, 'No such file', 'x.py')"): "error: x.py: No such file\n",
    ("", "--action=OSError(28, 'No space left on device')"): "error: No space left on device\n",
    ("", "--action=KeyboardInterrupt()"): "error: interrupted\n",
    ("", "--action=nan"): "error: Out of range float values",
}  # fmt: skip


def test_every_mistake_is_one_line_and_status_2(run, tmp_path):
    results = run(*([*line, f"--json={tmp_path}/out.json"] for line in MISTAKES))
    for (line, expected), (status, _, stderr) in zip(MISTAKES.items(), results, strict=True):
        assert status == 2, (line, stderr)
        assert stderr.startswith("error: ") and stderr.count("\n") == 1, (line, stderr)
        assert expected in stderr, (line, stderr)
    assert not list(tmp_path.iterdir())  # the refused NaN left neither a file nor a temporary one


def test_right_flags_reach_main(run, tmp_path):
    target = tmp_path / "deep" / "out.json"
    shown, nothing, logged, status, written, _help = run(
        ["", "--action=show", "--config.model.d_ff=7", "--config.model.remat",
         "--config.checkpoint.full_state_at=(100, 200)"],
        [""],
        ["", "--action=log"],
        ["", "--action=status"],
        ["", "--action=json", f"--json={target}"],
        ["", "--help"],
    )  # fmt: skip
    assert shown == [0, "7 (100, 200) True\n", ""]
    assert nothing == [0, "", ""]
    assert "alarm" in logged[2] and "chatter" not in logged[2]
    assert status[0] == 5
    assert written[0] == 0 and json.loads(target.read_text()) == {"d_ff": 1024}
    assert [p.name for p in target.parent.iterdir()] == ["out.json"]
    assert "--action" in _help[1] and "error" not in _help[2]


def test_config_is_required_and_lists_those_that_exist(run):
    missing, near, order = run(
        ["--action=show"],
        ["--config=experiments/configs/dmeo.py"],
        ["--config.model.d_ff=3", "--config=experiments/configs/demo.py"],
        config_flag="",
    )
    assert missing[0] == 2 and "--config=FILE is required" in missing[2] and "demo.py" in missing[2]
    assert near[0] == 2 and "did you mean demo.py?" in near[2]
    assert order[0] == 2 and order[2].count("\n") == 1


def test_debug_shows_the_traceback_and_a_bug_always_does(run):
    debug, early, bug = run(
        ["", "--action=ValueError('bad value')", "--debug"],
        ["", "--config.model.dff=3", "--debug"],
        ["", "--action=RuntimeError('a bug')"],
    )
    for status, _, stderr in (debug, early):
        assert status == 2 and "Traceback" in stderr and "error: " in stderr
    assert bug[0] == 1 and "Traceback" in bug[2] and "RuntimeError: a bug" in bug[2]


def test_a_long_message_is_cut():
    text = app.message(ValueError("word " * 1000))
    assert len(text) < app.LONGEST_MESSAGE + 50
    assert text.endswith("(all of it with --debug)")
    assert app.message(ValueError()) == "ValueError"


def test_json_of_arrays_and_dataclasses(tmp_path, monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Result:
        name: str
        value: np.ndarray

    class Flags:
        json = str(tmp_path / "out.json")

    monkeypatch.setattr(app.flags, "FLAGS", Flags)
    app.write_json([Result("a", np.arange(3)), np.float32(0.5), tmp_path])
    expected = [{"name": "a", "value": [0, 1, 2]}, 0.5, str(tmp_path)]
    assert json.loads((tmp_path / "out.json").read_text()) == expected
    with pytest.raises(TypeError, match="object has no JSON form"):
        app.write_json({"x": object()})
    assert json.loads((tmp_path / "out.json").read_text()) == expected


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"JAX_COORDINATOR_ADDRESS": "host:1"}, True),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, False),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, True),
        ({"SLURM_NTASKS": "2"}, False),  # a batch script's own environment, outside srun
        ({"OMPI_COMM_WORLD_SIZE": "4"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ],
)
def test_cluster_is_told_from_a_laptop(environment, expected):
    assert app.in_cluster(environment) is expected


@pytest.mark.slow
def test_two_processes_find_each_other():
    program = textwrap.dedent("""
        from experiments import app
        assert app.start_distributed()
        import jax
        print(jax.process_index(), jax.process_count(), jax.device_count())
    """)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = []
    for index in range(2):
        environment = os.environ | {
            "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(index), "JAX_NUM_CPU_DEVICES": "3", "JAX_PLATFORMS": "cpu",
        }  # fmt: skip
        command = [sys.executable, "-c", program]
        processes.append(
            subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE)
        )
    printed = [process.communicate(timeout=120)[0].decode() for process in processes]
    assert printed == ["0 2 6\n", "1 2 6\n"]


def test_starting_a_binary_does_not_start_jax():
    program = "import sys; from experiments import app; print('jax' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True
    )
    assert done.stdout == b"False\n"


@pytest.mark.skipif(app.platform.libc_ver()[0] != "glibc", reason="no glibc")
def test_glibc_accepts_the_allocator_settings():
    program = "from experiments import app; print(app.tune_allocator())"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True
    )
    assert done.stdout == b"True\n"


def test_other_allocators_are_left_alone(monkeypatch):
    monkeypatch.setattr(app.platform, "libc_ver", lambda: ("", ""))
    assert app.tune_allocator() is False
