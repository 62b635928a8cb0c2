import concurrent.futures
import errno
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from olmoe_jax import checkpoints
from olmoe_jax.checkpoints import manifest, streamed
from tests.checkpoints import small


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    small.parts(monkeypatch)


@pytest.fixture
def run(make_config):
    """A config whose arrays have several slabs."""
    return make_config(num_experts=8)


def test_only_its_slabs_are_taken(run, tmp_path):
    arrays = small.random_arrays(run)
    name = "layers/01/moe/w_up"
    with small.writer(tmp_path / "model", run, arrays) as writer:
        (start, stop), *_ = [(a, b) for n, a, b in writer.pending() if n == name and a > 0]
        good = arrays[name][start:stop]
        with pytest.raises(ValueError, match=f"{name}: no slab starts at {start + 99}"):
            writer.write(name, start + 99, good)
        with pytest.raises(ValueError, match="no slab starts at 0"):
            writer.write("layers/07/moe/w_up", 0, good)
        for bad in (good.view(np.int32), good[:, :5], good[:0]):
            with pytest.raises(ValueError, match=f"{name}, slab {start}:{stop}: is .*, expected"):
                writer.write(name, start, bad)
        missing = len(writer.pending())
        writer.write(name, start, np.asfortranarray(good))
        assert len(writer.pending()) == missing - 1
        with pytest.raises(
            ValueError, match=rf"{missing - 1} of {missing} slabs are missing \(emb"
        ):
            writer.finish()
    assert [p.name for p in tmp_path.iterdir()] == ["model.partial"]


def test_a_full_disk_is_one_clear_error(run, tmp_path, monkeypatch):
    arrays = small.random_arrays(run)
    message = "RESOURCE_EXHAUSTED: Error writing: [OS error 28: ENOSPC No space left]\nmore"

    class Full:
        def __getitem__(self, _):
            raise ValueError(message)

    with small.writer(tmp_path / "model", run, arrays) as writer:
        monkeypatch.setattr(writer, "_store", lambda name: Full())
        name, start, stop = writer.pending()[1]
        with pytest.raises(OSError, match=f"model.partial: {name} was not written: no space") as e:
            writer.write(name, start, arrays[name][start:stop])
    assert e.value.errno == errno.ENOSPC and "\n" not in str(e.value)


def test_slabs_may_be_written_from_several_threads(run, tmp_path, same_bits):
    arrays = small.random_arrays(run)
    with small.writer(tmp_path / "model", run, arrays) as writer:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            jobs = [(n, a, arrays[n][a:b]) for n, a, b in writer.pending()]
            list(pool.map(lambda job: writer.write(*job), jobs))
        writer.finish()
    read = checkpoints.read_params(tmp_path / "model", verify=True)
    assert same_bits(read, small.params(run, arrays))


def test_a_damaged_slab_is_written_again_when_going_on(run, tmp_path, same_bits):
    arrays = small.random_arrays(run)
    with small.writer(tmp_path / "model", run, arrays) as writer:
        everything = writer.pending()
        for name, start, stop in everything[:-3]:
            writer.write(name, start, arrays[name][start:stop])
    folder = tmp_path / "model.partial"
    small.flip(small.chunks(folder, "layers.01.moe.w_up")[0], 5)
    small.chunks(folder, "layers.00.moe.router")[0].unlink()
    (folder / "params" / "final_norm.scale" / ".zarray").write_text("{")
    with small.writer(tmp_path / "model", run, arrays) as writer:
        again = writer.pending()
        assert [name for name, *_ in again[:-3]] == [
            "final_norm/scale",
            "layers/00/moe/router",
            "layers/01/moe/w_up",
        ]
        assert again[-3:] == everything[-3:]
        for name, start, stop in again:
            writer.write(name, start, arrays[name][start:stop])
        writer.finish()
    read = checkpoints.read_params(tmp_path / "model", verify=True)
    assert same_bits(read, small.params(run, arrays))


def test_another_job_is_refused(run, tmp_path):
    arrays = small.random_arrays(run)
    small.writer(tmp_path / "model", run, arrays).__exit__(None, None, None)
    with pytest.raises(
        ValueError, match="left by another job: it had dtype=None, this one dtype='"
    ):
        small.writer(tmp_path / "model", run, arrays, job=small.JOB | {"dtype": "bfloat16"})
    with pytest.raises(ValueError, match="left by another job: it had parts="):
        small.writer(tmp_path / "model", run, arrays | {"more": np.zeros(3, np.float32)})


KILLED = textwrap.dedent(
    """
    import os, signal, sys

    os.environ["JAX_PLATFORMS"] = "cpu"
    import numpy as np
    from olmoe_jax.checkpoints import manifest, partial, streamed

    path, moment = sys.argv[1:]
    streamed.CHUNK, streamed.SLAB = 1 << 18, 1 << 20
    calls = []
    digest, write_record = manifest.digest, manifest.write_record

    def kill(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    def killing_digest(array):
        calls.append(array)
        return kill() if len(calls) == 6 and moment == "inside a slab" else digest(array)

    manifest.digest = killing_digest
    if moment == "before the manifest":
        manifest.write_record = kill
    if moment == "before the rename":
        partial.sync = kill
    array = np.arange(2**21, dtype=np.float32).reshape(16, 2**17)
    with streamed.StreamedWriter(
        path, {"a/w": (array.shape, array.dtype)}, config_json="{}", files={"f": b"1"}, job={}
    ) as writer:
        print(*(start for _, start, _ in writer.pending()), flush=True)
        for name, start, stop in writer.pending():
            writer.write(name, start, array[start:stop])
        writer.finish()
    """
)


def _run_killed(path, moment):
    command = [sys.executable, "-c", KILLED, str(path), moment]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "moment",
    [
        "inside a slab",
        "before the rename",
        pytest.param("before the manifest", marks=pytest.mark.slow),
    ],
)
def test_a_kill_leaves_nothing_that_looks_complete_and_keeps_the_slabs(moment, tmp_path):
    path = tmp_path / "model"
    ended = _run_killed(path, moment)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert ended.stdout.split() == [str(i) for i in range(0, 16, 2)]
    assert [p.name for p in tmp_path.iterdir()] == ["model.partial"]
    with pytest.raises(FileNotFoundError, match="a port or upcycling that did not finish"):
        checkpoints.find(path)
    ended = _run_killed(path, "never")
    assert (ended.returncode, ended.stderr) == (0, "")  # Orbax has nothing to say
    left = ["10", "12", "14"] if moment == "inside a slab" else []
    assert ended.stdout.split() == left
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    array = np.arange(2**21, dtype=np.float32).reshape(16, 2**17)
    reader = streamed.StreamedReader(path)
    assert (reader.read("a/w") == array).all()
    assert not manifest.damaged_leaves(reader.path, "params", reader.leaves)
    files = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()}
    chunks = {f"params/a.w/{i}.{j}" for i in range(16) for j in range(2)}
    beside = {"config.json", "f", "manifest/process_0.json", "params/_METADATA"}
    assert files == chunks | beside | {"params/a.w/.zarray"}
