"""Weight decay of the embedding and the head, or not.

Command: `python -m experiments.run_study --study=weight_decay_embeddings --workdir=DIR
  --scale=laptop`; the pilot before it with `--pilot`.
Paper: figure 17 of arXiv 2409.02060: about 63 B tokens: validation loss on C4, read off the figure,
  2.793 with decay against 2.794; training loss 2.454 against 2.452. The paper calls the difference
  negligible and decays them for simplicity.
"""

from olmoe_jax import studies

STUDY = studies.Study(
    name="weight_decay_embeddings",
    question="Does it matter whether weight decay covers embedding and head?",
    arms=(
        studies.Arm(name="decayed", changes={"optimizer.decay_embeddings": True}),
        studies.Arm(name="left_out", changes={"optimizer.decay_embeddings": False}),
    ),
    outcomes=(
        studies.Outcome(
            arm="decayed", against="left_out", expected="equal", paper="2.793 against 2.794 on C4",
        ),
    ),
)  # fmt: skip
