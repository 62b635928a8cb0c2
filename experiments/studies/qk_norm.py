"""Norms of queries and keys, or none.

Command: `python -m experiments.run_study --study=qk_norm --workdir=DIR --scale=laptop`; the pilot
  before it with `--pilot`.
Paper: figure 18 of arXiv 2409.02060: with against without, about 330 B tokens, both with a
  non-parametric LayerNorm elsewhere: validation loss on C4, read off the figure, 2.652 against
  2.660; training loss 2.350 against 2.362; more stable, at about 10 % of the throughput. With RMS
  norms elsewhere, as here, the paper reports a small gain in training loss and one spike less.

The scales of the norms are parameters that only one arm has, so parameters are not held equal.
"""

from olmoe_jax import studies

STUDY = studies.Study(
    name="qk_norm",
    question="Does normalising queries and keys help?",
    arms=(
        studies.Arm(name="with_norm", changes={"model.qk_norm": True}),
        studies.Arm(name="without", changes={"model.qk_norm": False}),
    ),
    equal=("flops_per_token", "tokens", "data_order"),
    outcomes=(
        studies.Outcome(
            arm="with_norm", against="without", expected="lower",
            paper="2.652 against 2.660 on C4", smallest_effect=0.008,
        ),
    ),
)  # fmt: skip
