"""Weight decay of the norms' scales, or not.

Command: `python -m experiments.run_study --study=weight_decay_norms --workdir=DIR --scale=laptop`;
  the pilot before it with `--pilot`.
Paper: figure 15 of arXiv 2409.02060: about 32 B tokens: validation loss on C4, read off the figure,
  2.728 with decay against 2.732; training loss 2.404 against 2.406. The paper calls decay slightly
  better.

An effect of 0.004 nats is small beside what seeds do: expect to be told how many it would take.
"""

from olmoe_jax import studies

STUDY = studies.Study(
    name="weight_decay_norms",
    question="Should weight decay cover the scales of the norms?",
    arms=(
        studies.Arm(name="decayed", changes={"optimizer.decay_norms": True}),
        studies.Arm(name="left_out", changes={"optimizer.decay_norms": False}),
    ),
    outcomes=(
        studies.Outcome(
            arm="decayed", against="left_out", expected="lower", paper="2.728 against 2.732 on C4",
            smallest_effect=0.004,
        ),
    ),
)  # fmt: skip
