"""`checkpoint`: what saving in the background costs a run, as a share of its step time.

Train steps of work A (see `work`), in turn: without a save, with a save of the parameters, and with
one of the whole train state beside them, as the training loop makes them: asynchronous, with the
hash of every piece. A save starts before a few steps and is waited for after them, so all that it
costs is in their seconds; a run that saves every INTERVAL steps pays it once per INTERVAL. Hashing
alone and a plain write of the same bytes are measured beside them. Last, a save is read back,
verified, and compared bit by bit with the parameters at its step, which later steps overwrote.
"""

import contextlib
import os
import pathlib
import shutil
import tempfile
import time

import jax
import numpy as np

from olmoe_jax import accounting, checkpoints, machine
from olmoe_jax.benchmarking import rounds as rounds_lib
from olmoe_jax.benchmarking import tables, work
from olmoe_jax.checkpoints import layout, manifest

INTERVAL = 10  # steps between saves, for the share
STEPS = 2  # of one sample
PLAIN, PARAMS, STATE = "steps", "steps, saving parameters", "steps, saving parameters and state"
HASHING, WRITING = "hashing alone", "writing alone"
BLOCKED, WAITED, BYTES = "blocked_seconds", "waited_seconds", "bytes"
RATIOS = {PARAMS: "share_of_step_time", STATE: "share_of_step_time_with_state"}


def run(options):
    """The suite; (what --json gets, whether a save came back as it was)."""
    config = work.config(dtype=options.dtype, expert_backend=options.expert_backend or "auto")
    result = measure(config, options)
    _show(result)
    return result, result["came_back"]


def measure(config, options) -> dict:
    """All of it, for a config made by `work.config`.

    Raises:
      OSError: there is not enough room.
    """
    sizes = accounting.disk(config)
    machine.check_disk(
        options.scratch, 2 * (sizes.one_checkpoint + sizes.one_state),
        "two saves of parameters and state", "name another --scratch",
    )  # fmt: skip
    os.makedirs(options.scratch, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="checkpoint_", dir=options.scratch) as folder,
        _Run(config, pathlib.Path(folder)) as under_test,
    ):
        for name, contest in under_test.contestants(steps=1).items():  # compiles
            under_test.clear(name)
            contest()
        contestants = under_test.contestants(steps=STEPS)
        found = rounds_lib.compare(contestants, rounds=options.rounds, prepare=under_test.clear)
        came_back = under_test.comes_back()
    return {
        "suite": "checkpoint",
        "dtype": config.model.dtype,
        "interval": INTERVAL,
        "came_back": came_back,
        **_figures(found, accounting.param_bytes(config.model, config.checkpoint.dtype)),
    }


class _Run:
    """A trainer and the saves of its state. A context manager."""

    def __init__(self, config, folder):
        self._config, self._folder, self._number = config, folder, 0
        self._trainer = work.Trainer(config)
        self._batch = work.batch(work.tokens(config, 1)[0])

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            self._saver = stack.enter_context(
                checkpoints.Checkpoints(self._folder / "run", self._config)
            )
            self._closing = stack.pop_all()
        return self

    def __exit__(self, *error):
        return self._closing.__exit__(*error)

    def contestants(self, steps):
        """Name → what makes a Sample."""
        return {
            PLAIN: lambda: self._steps(steps),
            PARAMS: lambda: self._steps(steps, PARAMS),
            STATE: lambda: self._steps(steps, PARAMS, STATE),
            HASHING: self._hash,
            WRITING: self._write,
        }

    def clear(self, name):
        """Removes what earlier contestants wrote, and has the rest of it written to the disk."""
        del name
        for written in (self._folder / "plain", *(self._folder / "run").glob("*/step*")):
            shutil.rmtree(written, ignore_errors=True)
        os.sync()

    def comes_back(self) -> bool:
        """Whether parameters saved before steps are read back as they were then."""
        before = jax.tree.map(np.array, self._trainer.state["params"])
        self.clear(PARAMS)
        self._steps(1, PARAMS)
        ((_, path),) = checkpoints.list_checkpoints(self._folder / "run")
        host = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda x: host, before)
        try:
            found = checkpoints.read_params(path, self._config.model, shardings, verify=True)
        except checkpoints.DamagedError:
            return False
        same = jax.tree.map(lambda x, y: np.array_equal(x, np.asarray(y)), before, found)
        return all(jax.tree.leaves(same))

    def _steps(self, count, *saves):
        """So many steps, behind the start of these saves and before their end."""
        self._number += 1
        begun = time.perf_counter()
        if PARAMS in saves:
            self._saver.save_params(self._number, self._trainer.state["params"])
        if STATE in saves:
            self._saver.save_state(self._number, self._trainer.state)
        started = time.perf_counter()
        for _ in range(count):
            self._trainer.step(self._batch)
        jax.block_until_ready(self._trainer.state)
        stepped = time.perf_counter()
        self._saver.wait()
        ended = time.perf_counter()
        values = {BLOCKED: started - begun, WAITED: ended - stepped, BYTES: self._bytes()}
        return rounds_lib.Sample(ended - begun, values if saves else {})

    def _bytes(self):
        files = (self._folder / "run").rglob("*")
        return sum(file.stat().st_size for file in files if file.is_file())

    def _pieces(self):
        """The bytes that a save of the parameters hashes and writes."""
        leaves = layout.flatten(layout.to_stored(self._trainer.state["params"], self._config.model))
        return [np.asarray(leaf.astype(self._config.checkpoint.dtype)) for leaf in leaves.values()]

    def _hash(self):
        pieces, begun = self._pieces(), time.perf_counter()
        for piece in pieces:
            manifest.digest(piece)
        return rounds_lib.Sample(time.perf_counter() - begun)

    def _write(self):
        pieces, begun = self._pieces(), time.perf_counter()
        (self._folder / "plain").mkdir()
        with open(self._folder / "plain" / "bytes", "wb") as file:
            for piece in pieces:
                file.write(piece.reshape(-1).view(np.uint8))
        return rounds_lib.Sample(time.perf_counter() - begun)


def _figures(found, size):
    """Contestants and ratios of Rounds; `size`: bytes of the parameters."""
    plain, shares = found.samples[PLAIN], {}
    for name in RATIOS:
        pairs = zip(plain, found.samples[name], strict=True)
        extra = [(saving.seconds - alone.seconds) / alone.seconds for alone, saving in pairs]
        shares[name] = rounds_lib.summarize([x * STEPS / INTERVAL for x in extra])
    rows = {}
    for name in found.samples:
        rows[name] = {"seconds": found.summary(name)}
        if name in shares:
            measured = {key: found.summary(name, key) for key in (BLOCKED, WAITED, BYTES)}
            rows[name] |= {"share_of_step_time": shares[name], **measured}
        elif name != PLAIN:
            rows[name]["gb_per_second"] = size / 1e9 / rows[name]["seconds"].median
    return {
        **{f"ratio_{key}": shares[name].median for name, key in RATIOS.items()},
        "parameter_bytes": size,
        "seconds_per_step": rows[PLAIN]["seconds"].median / STEPS,
        "contestants": rows,
        **found.account(),
        "environment": machine.environment(),
    }


def _show(result):
    rows = [("", "seconds", "% of step time", "blocked s", "waited s", "GB on disk", "GB/s")]
    for name, row in result["contestants"].items():
        cells = [""] * 4
        if (share := row.get("share_of_step_time")) is not None:
            percent = rounds_lib.Summary(*(100 * x for x in (share.median, share.low, share.high)))
            cells = [percent.text(1), row[BLOCKED].text(), row[WAITED].text(),
                     f"{row[BYTES].median / 1e9:.2f}"]  # fmt: skip
        rate = row.get("gb_per_second")
        rows.append((name, row["seconds"].text(), *cells, "" if rate is None else f"{rate:.2f}"))
    print(
        f"\ncheckpoint: parameters {result['parameter_bytes'] / 1e9:.2f} GB in {result['dtype']}, "
        f"saved every {result['interval']} steps of {result['seconds_per_step']:.2f} s; {STEPS} "
        f"steps a sample; median (lowest–highest)\n{tables.table(rows)}"
    )
    if result["came_back"]:
        print("a save came back verified and bit for bit")
    else:
        print("WRONG: a save did not come back as the parameters were")
    print(tables.footer(result))
