"""An expert that every token passes through, in place of one that it may choose.

Command: `python -m experiments.run_study --study=shared_expert --workdir=DIR --scale=laptop`; the
  pilot before it with `--pilot`.
Paper: figure 6 of arXiv 2409.02060: 32 experts top-4 of width 2048 against 31 top-3 and one shared,
  130 B tokens. Validation loss on C4, read off the figure: 2.709 against 2.722; training loss 2.401
  against 2.415. A shared expert leaves 4,495 combinations of experts instead of 35,960.

The experts are twice as wide as the base's and half as many, which at scale `paper` are the 32 of
the figure. Its published configuration has 32 chosen experts beside the shared one; we follow the
text, 31, where parameters are equal. The shared expert's output is added unweighted, as there.
"""

from olmoe_jax import studies


def _half(field):
    return lambda base: getattr(base.model, field) // 2


STUDY = studies.Study(
    name="shared_expert",
    question="Does one expert for every token help, in place of one to choose?",
    arms=(
        studies.Arm(
            name="routed",
            changes={
                "model.num_experts": _half("num_experts"),
                "model.num_experts_per_token": _half("num_experts_per_token"),
                "model.d_ff": lambda base: 2 * base.model.d_ff,
            },
        ),
        studies.Arm(
            name="shared",
            changes={
                "model.num_experts": lambda base: base.model.num_experts // 2 - 1,
                "model.num_experts_per_token": (
                    lambda base: base.model.num_experts_per_token // 2 - 1
                ),
                "model.num_shared_experts": 1,
                "model.d_ff": lambda base: 2 * base.model.d_ff,
            },
        ),
    ),
    outcomes=(
        studies.Outcome(
            arm="shared", against="routed", expected="higher", paper="2.722 against 2.709 on C4",
            smallest_effect=0.01,
        ),
    ),
)  # fmt: skip
