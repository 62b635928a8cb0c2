"""Writes kept parameters and train states with Orbax: asynchronous, atomic, with a manifest."""

import dataclasses
import errno
import json

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from olmoe_jax.checkpoints import layout, manifest, naming, quiet, reading

KEPT_STATES = 2
SECONDS_PER_SAVE = 3600  # after which a save in the background counts as failed


class Checkpoints:
    """The checkpoints of a run. A context manager: leaving it waits for the saves under way.

    A save returns when the arrays are copied; hashing, writing and the final rename happen in the
    background. What goes wrong there is raised by the next save of that kind, `wait` or `close`. On
    several processes all must make the same calls.

    Args:
      workdir: the run's directory, made if absent. What a killed save left there is removed.
      config: the run's Config; a copy goes into every checkpoint.
      report: called with a line for a person (on process 0).
    """

    def __init__(self, workdir, config, *, report=print):
        quiet.silence_orbax()
        self._config, self._report = config, report
        self._workdir = naming.absolute(workdir)
        self._kept = self._workdir / naming.CHECKPOINTS
        self._resume = self._workdir / naming.RESUME
        if jax.process_index() == 0:
            for folder in (self._kept, self._resume):
                folder.mkdir(parents=True, exist_ok=True)
                for path in naming.leftovers(folder):
                    naming.remove_leftover(path)
                    report(f"removed {path}: left by a save that did not finish")
        _barrier("checkpoints:opened")
        self._writers = {item: _writer(item) for item in (reading.PARAMS, reading.STATE)}
        self._under_way = {}
        self._compiled = None

    def __enter__(self):
        return self

    def __exit__(self, kind, value, traceback):
        if kind is None:
            self.close()
            return
        try:
            self.close()
        except OSError as error:  # the exception that ends the block matters more
            self._report(f"error: {error}")

    def save_params(self, step: int, params) -> bool:
        """Starts to save parameters in checkpoint.dtype; False if `step` is there already.

        Args:
          params: the training tree of jax.Arrays; may be donated as soon as this returns.

        Raises:
          OSError: an earlier save failed.
        """
        path = self._begin(reading.PARAMS, step)
        if path is None:
            return False
        self._save(reading.PARAMS, step, path, self._slices(params))
        return True

    def save_state(self, step: int, state) -> bool:
        """Starts to save a whole train state; False if it is there already.

        The newest two are kept, and for ever those at the steps in checkpoint.full_state_at. An
        older one goes when the new one is complete and `wait`, `close` or the next save notices:
        until then there are three.

        Args:
          state: any tree of jax.Arrays; may be donated as soon as this returns.

        Raises:
          OSError: an earlier save failed.
        """
        path = self._begin(reading.STATE, step)
        if path is None:
            return False
        if jax.default_backend() == "cpu":
            # There the host's view of an array is its memory. JAX 0.10 and 0.12 do not reuse a
            # donated array while NumPy looks at it (measured), but nothing promises that.
            state = jax.tree.map(jnp.copy, state)
        self._save(reading.STATE, step, path, layout.unflatten(layout.flatten(state)))
        return True

    def wait(self):
        """Waits until the saves under way are complete.

        Raises:
          OSError: one failed; earlier checkpoints are as they were.
        """
        failures = []
        for item in self._writers:
            try:
                self._finish(item)
            except OSError as error:
                failures.append(error)
        if failures:
            raise failures[0]

    def close(self):
        """`wait`, and ends the background threads."""
        try:
            self.wait()
        finally:
            for writer in self._writers.values():
                writer.close()

    def params_steps(self) -> list[int]:
        """Steps whose parameters are kept, rising."""
        return [step for step, _ in naming.list_complete(self._kept)]

    def state_steps(self) -> list[int]:
        """Steps whose train state is there, rising."""
        return [step for step, _ in naming.list_complete(self._resume)]

    def restore_state(self, abstract_state):
        """The newest train state, or None if there is none.

        Args:
          abstract_state: tree of jax.ShapeDtypeStruct with shardings.

        Raises:
          ValueError: it is of another configuration; DamagedError: it is damaged. No older one is
            taken silently.
        """
        self.wait()
        states = naming.list_complete(self._resume)
        if not states:
            return None
        try:
            return reading.read_state(states[-1][1], abstract_state, self._config.model)
        except manifest.DamagedError as error:
            older = f"resume from {states[-2][1].name}" if len(states) > 1 else "start from step 0"
            message = f"{error}; delete that directory to {older}"
            raise manifest.DamagedError(message) from error

    def _slices(self, params):
        """`params` as on disk, in checkpoint.dtype: new arrays, which no donation can touch."""
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
        )
        if self._compiled is None or self._compiled[0] != abstract:
            model, dtype = self._config.model, self._config.checkpoint.dtype
            stored = layout.to_stored(abstract, model)

            def slices(tree):
                # copy: an output that is an input unchanged would share its memory
                return jax.tree.map(
                    lambda x: jnp.copy(x).astype(dtype), layout.to_stored(tree, model)
                )

            out = jax.tree.map(lambda x: x.sharding, stored)
            self._compiled = abstract, jax.jit(slices, out_shardings=out)
        return self._compiled[1](params)

    def _begin(self, item, step):
        """Where to save `step`, when the save before is complete; None if it is there already."""
        self._finish(item)
        folder = self._kept if item == reading.PARAMS else self._resume
        path = folder / naming.checkpoint_name(step, step * self._config.tokens_per_step)
        return None if naming.is_complete(path) else path

    def _save(self, item, step, path, tree):
        record = {"config": dataclasses.asdict(self._config), "step": step}
        args = manifest.SaveArgs(
            item=tree,
            pieces=manifest.own_pieces(layout.flatten(tree)),
            config_json=json.dumps(record, indent=2) + "\n",
        )
        self._under_way[item] = path
        try:
            self._writers[item].save(path, args=ocp.args.Composite(**{item: args}))
        except Exception as error:
            self._under_way.pop(item)
            raise _failure(path, error) from error

    def _finish(self, item):
        path = self._under_way.pop(item, None)
        if path is None:
            return
        try:
            self._writers[item].wait_until_finished()
        except Exception as error:
            raise _failure(path, error) from error
        if item == reading.STATE:
            self._remove_old_states()

    def _remove_old_states(self):
        if jax.process_index() != 0:
            return
        for step, path in naming.list_complete(self._resume)[:-KEPT_STATES]:
            if step not in self._config.checkpoint.full_state_at:
                naming.remove(path)


def _writer(item):
    processes = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=item)
    options = ocp.options.AsyncOptions(
        timeout_secs=SECONDS_PER_SAVE, create_directories_asynchronously=False
    )
    # zstd saves a tenth of float32 weights: worth its time for what is kept, not for the rest.
    arrays = manifest.Handler(
        use_compression=item == reading.PARAMS, multiprocessing_options=processes
    )
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    registry.add(item, manifest.SaveArgs, arrays)
    handler = ocp.CompositeCheckpointHandler(
        handler_registry=registry,
        composite_options=ocp.CompositeOptions(
            multiprocessing_options=processes, async_options=options
        ),
    )
    return ocp.AsyncCheckpointer(handler, async_options=options, multiprocessing_options=processes)


def _barrier(name):
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _failure(path, error) -> OSError:
    """One line for whatever Orbax raised."""
    text = str(error)
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text or "ENOSPC" in text:
        code, reason = errno.ENOSPC, "no space left on the disk; free some"
    else:
        code, reason = (
            getattr(error, "errno", None),
            text.splitlines()[0][:200] if text else repr(error),
        )
    message = (
        f"checkpoint {path.name} was not saved in {path.parent}: {reason}. Earlier checkpoints are "
        "complete; running the same command again resumes from the newest"
    )
    failure = OSError(message)
    failure.errno = code
    return failure
