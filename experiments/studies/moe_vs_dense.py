"""A Mixture of Experts against a dense model that costs the same per token.

Command: `python -m experiments.run_study --study=moe_vs_dense --workdir=DIR --scale=laptop`; the
  pilot before it with `--pilot`.
Paper: section 4.1.1 and figure 4 of arXiv 2409.02060: 64 experts top-8 against a dense FFN as wide
  as those 8, 1.3 B active parameters each, 130 B tokens: validation loss on C4 2.700 against 2.861.
  The MoE has the dense model's final quality after about a third of the tokens and FLOPs, and half
  of the time (23,600 against 37,500 tokens/s on an H100).

Total parameters are not held equal: they are what is compared. Both learning rates fall until the
end, as in the paper, so the ratios are of curves that have not come to rest.
"""

from olmoe_jax import studies


def _cost(measure, paper):
    return studies.Outcome(
        arm="moe", against="dense", measure=measure, expected="lower", paper=paper,
        smallest_effect=0.05,
    )  # fmt: skip


STUDY = studies.Study(
    name="moe_vs_dense",
    question="Does a Mixture of Experts learn more than a dense model of equal active parameters?",
    max_seeds=5,
    arms=(
        studies.Arm(
            name="dense",
            changes={
                "model.d_ff": lambda base: base.model.d_ff * base.model.num_experts_per_token,
                "model.num_experts": 0,
                "model.num_experts_per_token": 0,
                "losses.load_balancing_weight": 0.0,
                "losses.router_z_weight": 0.0,
            },
        ),
        studies.Arm(name="moe"),
    ),
    equal=("active_parameters", "flops_per_token", "tokens", "data_order"),
    outcomes=(
        studies.Outcome(
            arm="moe", against="dense", expected="lower", paper="2.700 against 2.861 on C4",
            smallest_effect=0.02,
        ),
        _cost("tokens", "about 1/3 of the tokens"),
        _cost("flops", "about 1/3 of the FLOPs"),
        _cost("seconds", "about 1/2 of the time"),
    ),
)  # fmt: skip
