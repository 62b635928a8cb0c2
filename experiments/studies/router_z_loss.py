"""A loss that keeps the router's logits small, or none.

Command: `python -m experiments.run_study --study=router_z_loss --workdir=DIR --scale=laptop`; the
  pilot before it with `--pilot`.
Paper: figure 11 of arXiv 2409.02060: weight 0.001 against none, to 750 B tokens: validation loss on
  C4, read off the figure, 2.598 against 2.625; training loss 2.314 against 2.347; fewer spikes, at
  2 % of the throughput. The code that trained the paper's models divides this loss by the number of
  chosen experts, which the weight of scale `paper` follows.

The gain is stability over hundreds of billions of tokens. A short run shows what the loss does to
the logits, and hardly what that is good for.
"""

from olmoe_jax import studies

STUDY = studies.Study(
    name="router_z_loss",
    question="Does a loss on the size of the router's logits help?",
    arms=(
        studies.Arm(name="with_loss"),
        studies.Arm(name="without", changes={"losses.router_z_weight": 0.0}),
    ),
    outcomes=(
        studies.Outcome(
            arm="without", against="with_loss", expected="higher",
            paper="2.625 against 2.598 on C4 after 750 B tokens",
        ),
        studies.Outcome(
            arm="without", against="with_loss", metric="validation/router_z_loss",
            expected="higher", smallest_effect=0.1,
        ),
    ),
)  # fmt: skip
