"""The chosen experts' softmax values as they are, or divided by their sum.

Command: `python -m experiments.run_study --study=renormalised_weights --workdir=DIR
  --scale=laptop`; the pilot before it with `--pilot`.
Paper: OLMoE (arXiv 2409.02060) takes them as they are, Mixtral (arXiv 2401.04088) and DeepSeek-V3
  divide. We know of no published comparison, so nothing is expected.

As they are, the weights of a token sum to less than one, at the beginning to about k / experts, so
that an MoE layer starts with a smaller output; the norm in front of the next layer does not undo
that, as the residual stream is added.
"""

from olmoe_jax import studies

STUDY = studies.Study(
    name="renormalised_weights",
    question="Should the weights of a token's experts sum to one?",
    arms=(
        studies.Arm(name="raw", changes={"model.normalize_expert_weights": False}),
        studies.Arm(name="renormalised", changes={"model.normalize_expert_weights": True}),
    ),
    outcomes=(studies.Outcome(arm="renormalised", against="raw"),),
)
