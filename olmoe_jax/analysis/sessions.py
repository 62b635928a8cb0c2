"""A model's checkpoints, recorded and counted one by one, for `analyses.find`."""

import pathlib
import shutil

from olmoe_jax.analysis import analyses, counts_files, recording, saturation


def record(checkpoints, texts, folder, *, keep=True, total_steps=None, announce=print, **options):
    """Records all checkpoints of a model.

    Args:
      checkpoints: `suites.Checkpoint`s of one model, in order of training.
      texts: `texts.Text`s.
      folder: of the traces: FOLDER/CHECKPOINT/DOMAIN, with their counts.
      keep: all traces. Otherwise the last checkpoint is recorded first, and the traces of another
        one are deleted when it and the next have been compared; the last one's stay, for the
        caller to delete.
      total_steps: of the whole training, for the saturation.
      announce: called with lines for a person.
      options: of `recording.record`.
    Returns:
      (analyses.Recording of each checkpoint, saturation.Saturation or None: with all traces kept
      `analyses.find` computes it).
    """
    folder, said = pathlib.Path(folder), set()

    def announce_once(line):
        if line not in said:  # every checkpoint reads the same text
            said.add(line)
            announce(line)

    def place(checkpoint):
        return folder / (checkpoint.name or "model")

    def one(checkpoint):
        announce(f"recording {checkpoint.model} {checkpoint.name}".rstrip())
        found = recording.record(
            checkpoint, texts, place(checkpoint), announce=announce_once, **options
        )
        traces = {each.info.domain: each.trace for each in found}
        # Which tokens went where is asked of the last one only, and is half of the counting.
        is_last = checkpoint is checkpoints[-1]
        parts = {
            domain: counts_files.of_trace(trace, vocabulary=is_last)
            for domain, trace in traces.items()
        }
        return analyses.Recording(parts, traces)

    if keep or len(checkpoints) == 1:
        return [one(checkpoint) for checkpoint in checkpoints], None
    *earlier, last = checkpoints
    final, found, previous = one(last), [], None
    follower = saturation.Follower(final.traces.values())
    for checkpoint in earlier:
        recorded = one(checkpoint)
        follower.add(recorded.traces.values())
        found.append(analyses.Recording(recorded.parts, {}))
        if previous is not None:
            shutil.rmtree(place(previous))
        previous = checkpoint
    shutil.rmtree(place(previous))
    return [*found, final], follower.result(total_steps=total_steps)
