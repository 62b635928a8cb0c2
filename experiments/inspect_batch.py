"""Which documents a run trains on at a step, past or future, and the exact arrays.

    python -m experiments.inspect_batch --workdir=DIR --step=N [--tokens=FILE.npz]

One line per document of each row of the global batch: tokens first–last, domain, source, id, first
words. Steps are numbered from 0: step N is what update N → N + 1 sees. Computes nothing with JAX.
"""

from absl import flags

from experiments import app
from olmoe_jax.data import provenance

_WORKDIR = flags.DEFINE_string("workdir", None, "Workdir of a run.")
_STEP = flags.DEFINE_integer("step", None, "Step, from 0; may lie in the future.")
_TOKENS = flags.DEFINE_string("tokens", None, "Also write the step's arrays to this .npz file.")


def main(argv):
    """Prints the documents of a step."""
    del argv
    for flag in (_WORKDIR, _STEP):
        if flag.value is None:
            raise ValueError(f"--{flag.name} is required")
    contents = provenance.step_contents(_WORKDIR.value, _STEP.value)
    if _TOKENS.value is not None:
        provenance.save_arrays(_TOKENS.value, contents.batch)
    print(f"step {contents.step}, epoch {contents.epoch:.3f}, {len(contents.rows)} windows")
    masked = ~contents.batch["loss_mask"].any(axis=1)
    for row, (window, spans) in enumerate(zip(contents.windows, contents.rows, strict=True)):
        print(
            f"row {row}: window {window}{' (repetitive: not in the loss)' if masked[row] else ''}"
        )
        for span in spans:
            document = span.document
            place = f"{span.start}-{span.end - 1}"
            print(
                f"  {place:>11}  document {span.number}  {document.domain}  {document.source}  "
                f"{document.id}  {document.first_words!r}"
            )
    app.write_json(
        {
            "step": contents.step,
            "epoch": contents.epoch,
            "rows": [
                {"window": window, "documents": spans}
                for window, spans in zip(contents.windows, contents.rows, strict=True)
            ],
        }
    )


if __name__ == "__main__":
    app.run(main, flags_with_json=True)
