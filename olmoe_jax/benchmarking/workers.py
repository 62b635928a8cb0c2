"""Peers as subprocesses of other Pythons: asked in turn, alive over all rounds.

A peer is a script in `peers/` that imports nothing of ours nor JAX. It answers each line of JSON on
its stdin with one on its stdout (`peers/serving.py`).
"""

import contextlib
import json
import os
import shlex
import subprocess
import tempfile

import jax

from olmoe_jax import machine

# The same as experiments.app.tune_allocator does from within, without signs. Only glibc reads it.
GLIBC_TUNABLES = ":".join(
    f"glibc.malloc.{name}={value % 2**63}" for name, (_, value) in machine.MALLOC.items()
)
ENDING_SECONDS = 10.0


def torch_device() -> str:
    """What torch calls the device that we run on."""
    return "cuda" if jax.devices()[0].platform == "gpu" else "cpu"


class Worker:
    """A subprocess that answers requests; a context manager that ends it.

    Args:
      command: of the process.
      environment: variables beside those of this process; a None removes one.
      cwd: folder to run in.

    Raises:
      FileNotFoundError: the program does not exist.
    """

    def __init__(self, command, *, environment=None, cwd=None):
        self._command = [str(word) for word in command]
        changed = {**os.environ, **(environment or {})}
        self._stderr = tempfile.TemporaryFile()
        try:
            self._process = subprocess.Popen(
                self._command, cwd=cwd, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=self._stderr, env={k: v for k, v in changed.items() if v is not None},
            )  # fmt: skip
        except BaseException:
            self._stderr.close()
            raise

    @classmethod
    def peer(cls, options, script, *, allocator_tuned, environment=None):
        """The peer `script` run by --peer_python; without one a context manager that gives None.

        Args:
          options: options.Options.
          script: path of a script.
          allocator_tuned: give it our allocator settings; else it runs as shipped.
          environment: other variables.

        Raises:
          ValueError: --peer_python is no program.
        """
        if options.peer_python is None:
            return contextlib.nullcontext()
        tunables = GLIBC_TUNABLES if allocator_tuned else None
        # The peer's own folders only: a PYTHONPATH of ours would mix two installations.
        changed = {"GLIBC_TUNABLES": tunables, "PYTHONPATH": None, **(environment or {})}
        python = os.path.expanduser(options.peer_python)
        try:
            return cls([python, "-u", script], environment=changed)
        except OSError as error:
            raise ValueError(
                f"--peer_python={options.peer_python}: {error.strerror}; name the interpreter of "
                "an environment that holds the peer"
            ) from error

    @property
    def pid(self) -> int:
        """Of the subprocess."""
        return self._process.pid

    def __enter__(self):
        return self

    def __exit__(self, *error):
        try:
            with contextlib.suppress(OSError):  # it may be gone
                self._process.stdin.close()  # asks it to end
            if error[0] is not None:
                self._process.terminate()
            try:
                self._process.wait(ENDING_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        finally:
            self._process.stdout.close()
            self._stderr.close()

    def ask(self, **request) -> dict:
        """The answer to one request.

        Raises:
          ValueError: the other side ended or answered no JSON object: with the last line of its
            stderr.
        """
        with contextlib.suppress(OSError):  # gone: there will be no answer
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if isinstance(answer, dict):
            return answer
        if line:
            said = f"answered {line[:200].decode(errors='replace').strip()!r}, which is no object"
        else:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(ENDING_SECONDS)
            said = f"ended with status {self._process.poll()}: {self._last_words()}"
        raise ValueError(f"a peer {said} (it was {shlex.join(self._command)})")

    def _last_words(self):
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "(silent)"
