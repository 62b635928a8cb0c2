import subprocess
import sys
import textwrap

SCRIPT = textwrap.dedent(
    """
    import sys, types
    from absl import logging
    from olmoe_jax.checkpoints import quiet

    quiet.silence_orbax()
    quiet.silence_orbax()

    class Loud:
        def __init__(self, error):
            self.error = error

        def __del__(self):
            raise self.error

    Loud(RuntimeError("Event loop is closed"))
    Loud(RuntimeError("another matter"))
    exec(compile("async def abandoned(): pass", "/lib/orbax/io.py", "exec"))
    coroutine = abandoned()
    error = OSError("of orbax")
    sys.unraisablehook(
        types.SimpleNamespace(
            exc_type=OSError, exc_value=error, exc_traceback=None, err_msg=None, object=coroutine
        )
    )
    coroutine.close()
    logging.warning("ours")
    exec(compile("logging.warning('theirs')", "/lib/orbax/io.py", "exec"))
    """
)


def test_only_what_orbax_says_is_dropped():
    ended = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "another matter" in ended.stderr and "ours" in ended.stderr
    for unwanted in ("Event loop", "of orbax", "theirs"):
        assert unwanted not in ended.stderr
