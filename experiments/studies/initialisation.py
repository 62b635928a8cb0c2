"""Normal initialisation with its tails cut off at three standard deviations, or not.

Command: `python -m experiments.run_study --study=initialisation --workdir=DIR --scale=laptop`; the
  pilot before it with `--pilot`.
Paper: figure 13 of arXiv 2409.02060: standard deviation 0.02, to 600 B tokens: validation loss on
  C4, read off the figure, 2.624 truncated against 2.673; training loss 2.326 against 2.557. The
  curves part only after about 450 B tokens, where the untruncated one diverges.

What the paper found is a divergence late in training. A run that ends before says nothing about it:
below that length the honest outcome is that nothing can be told apart.
"""

from olmoe_jax import studies

STUDY = studies.Study(
    name="initialisation",
    question="Does it help to cut off the tails of the initial weights?",
    arms=(
        studies.Arm(name="truncated", changes={"model.init_cutoff": 3.0}),
        studies.Arm(name="normal", changes={"model.init_cutoff": None}),
    ),
    outcomes=(
        studies.Outcome(
            arm="normal", against="truncated", expected="higher",
            paper="2.673 against 2.624 on C4 after 600 B tokens",
        ),
    ),
)  # fmt: skip
