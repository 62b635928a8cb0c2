"""Tokens that choose experts against experts that choose tokens.

Command: `python -m experiments.run_study --study=token_vs_expert_choice --workdir=DIR
  --scale=laptop`; the pilot before it with `--pilot`.
Paper: figure 7 of arXiv 2409.02060: 8 experts of width 8192 in every second layer; token choice
  top-2 with the load-balancing loss against expert choice with capacity factor 2, about 205 B
  tokens. Validation loss on C4, read off the figure: 2.714 against 2.802; training loss 2.411
  against 2.493. Expert choice was about 20 % faster (29,400 against 24,400 tokens/s per device).

Expert choice is not causal: which tokens of a batch an expert takes depends on later ones, and at
generation those are not there. Its losses in training and validation are of a model that has seen
them, so they flatter it; what they flatter is measured at the last checkpoint, on first halves of
the validation windows behind which another text is put (`olmoe_jax.studies.causality`): how much a
token's loss then changes, and how much of the mean loss was owed to the text that truly follows.
Of token choice both are zero but for rounding.
"""

from olmoe_jax import studies
from olmoe_jax.studies import causality


def _outcome(**fields):
    return studies.Outcome(arm="expert_choice", against="token_choice", **fields)


STUDY = studies.Study(
    name="token_vs_expert_choice",
    question="Should tokens choose experts, or experts tokens?",
    common={
        "model.num_experts": 8,
        "model.num_experts_per_token": 2,
        "model.d_ff": lambda base: base.model.d_ff * base.model.num_experts_per_token,
        "model.moe_every": 2,
    },
    arms=(
        studies.Arm(name="token_choice"),
        studies.Arm(name="expert_choice", changes={"model.router": "expert_choice"}),
    ),
    outcomes=(
        _outcome(expected="higher", paper="2.802 against 2.714 on C4", smallest_effect=0.01),
        _outcome(metric=causality.DEPENDENCE, expected="higher", smallest_effect=0.001),
        _outcome(metric=causality.ADVANTAGE, smallest_effect=0.001),
        _outcome(metric="validation/load_balancing_loss", smallest_effect=0.05),
    ),
)
