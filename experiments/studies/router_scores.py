"""Experts scored against each other, or one by one.

Command: `python -m experiments.run_study --study=router_scores --workdir=DIR --scale=laptop`; the
  pilot before it with `--pilot`.
Paper: none of OLMoE, which takes the softmax. Wang et al. (arXiv 2408.15664, appendix C and table
  2) find sigmoids better at equal balance: with a load-balancing loss a perplexity of 9.56 against
  9.604 (1 B parameters, 100 B tokens, each at its best weight of the loss). DeepSeek-V3 (arXiv
  2412.19437) scores by sigmoids and divides those of the chosen experts by their sum.

In both arms the chosen experts' scores are divided by their sum, so that the arms differ in one
thing. The load-balancing loss of sigmoids is on each score's share in the sum over all experts, as
in DeepSeek-V3. Study `renormalised_weights` is about the division.
"""

from olmoe_jax import studies

STUDY = studies.Study(
    name="router_scores",
    question="Should experts be scored by a softmax over them, or by a sigmoid each?",
    common={"model.normalize_expert_weights": True},
    arms=(
        studies.Arm(name="softmax"),
        studies.Arm(name="sigmoid", changes={"model.router_scores": "sigmoid"}),
    ),
    outcomes=(
        studies.Outcome(
            arm="sigmoid", against="softmax", expected="lower", smallest_effect=0.005,
            paper="ln(9.56 / 9.604) = -0.0046, arXiv 2408.15664",
        ),
        studies.Outcome(
            arm="sigmoid", against="softmax", metric="validation/load_balancing_loss",
            smallest_effect=0.05,
        ),
    ),
)  # fmt: skip
