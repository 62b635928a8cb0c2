"""AdamW's epsilon: 1e-8 against 1e-5.

Command: `python -m experiments.run_study --study=adamw_eps --workdir=DIR --scale=laptop`; the pilot
  before it with `--pilot`.
Paper: figure 19 of arXiv 2409.02060: about 32 B tokens: validation loss on C4, read off the figure,
  2.727 with 1e-8 against 2.980 with 1e-5; training loss 2.401 against 2.630.

A large epsilon slows down parameters whose gradients are small. How small they are depends on the
size of the model and of the batch, so a small run may show less of it.
"""

from olmoe_jax import studies

STUDY = studies.Study(
    name="adamw_eps",
    question="How small should AdamW's epsilon be?",
    max_seeds=4,
    arms=(
        studies.Arm(name="eps_1e_8", changes={"optimizer.eps": 1e-8}),
        studies.Arm(name="eps_1e_5", changes={"optimizer.eps": 1e-5}),
    ),
    outcomes=(
        studies.Outcome(
            arm="eps_1e_5", against="eps_1e_8", expected="higher",
            paper="2.980 against 2.727 on C4", smallest_effect=0.02,
        ),
    ),
)  # fmt: skip
