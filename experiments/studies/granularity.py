"""How many experts: the same parameters cut into 8, 32, 64 or 128 of them.

Command: `python -m experiments.run_study --study=granularity --workdir=DIR --scale=laptop`; the
  pilot before it with `--pilot`.
Paper: figure 5 of arXiv 2409.02060: 64 experts top-8 of width 1024 against 32 top-4 of 2048 and 8
  top-1 of 8192, 130 B tokens. Validation loss on C4, read off the figure: 2.700, 2.709, 2.751;
  training loss 2.394, 2.401, 2.443. The text speaks of about 10 % from 8 to 32 experts and of 1 to
  2 % from 32 to 64; the figure shows +2.8 and +0.6 points of HellaSwag. It has no 128 experts.

Total and active parameters are equal but for the router, which grows with the number of experts.
The router z-loss has one weight for all arms; the code that trained the paper's divides it by the
number of chosen experts, so there it weighed eight times as much with one of them as with eight.
All arms have one learning rate, as the paper's: the pilot sets only the number of seeds.
Narrow experts are slower on most machines, which the verdicts on loss do not count.
"""

from olmoe_jax import studies

WIDEST = 8  # experts; an eighth of the experts, whatever their number, computes a token


def _arm(num_experts):
    def width(base):
        return base.model.num_experts * base.model.d_ff // num_experts

    chosen = num_experts // WIDEST
    return studies.Arm(
        name=f"top{chosen}_of_{num_experts}",
        changes={
            "model.num_experts": num_experts,
            "model.num_experts_per_token": chosen,
            "model.d_ff": width,
        },
    )


def _outcome(arm, against, **fields):
    return studies.Outcome(arm=arm, against=against, smallest_effect=0.01, **fields)


STUDY = studies.Study(
    name="granularity",
    question="Do more and narrower experts learn more than fewer and wider ones?",
    learning_rate_factors=(1.0,),
    max_seeds=4,
    arms=tuple(_arm(number) for number in (8, 32, 64, 128)),
    outcomes=(
        _outcome("top8_of_64", "top1_of_8", expected="lower", paper="2.700 against 2.751 on C4"),
        _outcome("top4_of_32", "top1_of_8", expected="lower", paper="2.709 against 2.751 on C4"),
        _outcome("top8_of_64", "top4_of_32", expected="lower", paper="2.700 against 2.709 on C4"),
        _outcome("top16_of_128", "top8_of_64"),
    ),
)
