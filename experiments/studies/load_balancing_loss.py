"""Balance by an auxiliary loss, by nothing, or by biases that no gradient trains.

Command: `python -m experiments.run_study --study=load_balancing_loss --workdir=DIR --scale=laptop`;
  the pilot before it with `--pilot`.
Paper: figures 9 and 10 of arXiv 2409.02060: with the loss against without, 8 experts, 10 B tokens:
  validation loss on C4, read off the figure, 3.711 against 3.787; training loss 3.450 against
  3.521. Without it the first MoE layer sends nearly every token to one expert, later some to a
  second; six stay dead. The load-balancing loss is at 4.3, then 2.8 times its balanced value.
  Loss-free balancing is by Wang et al. (arXiv 2408.15664): with sigmoid scores, 1 B parameters and
  100 B tokens a perplexity of 9.50 against 9.56 with a loss of weight 0.001 (table 2); with softmax
  scores, which these arms have, 9.599 against 9.604 at weight 0.0003 (appendix C), which is the
  outcome expected here: 0.0005 nats are none that matters.

Wang et al. move the biases of softmax scores in proportion to the excess load, because there the
gap between two experts depends on all others; here the step is fixed, 0.001, as with their sigmoids
and in DeepSeek-V3. They make 40,000 steps; in a few hundred no bias gets beyond a few tenths.

All arms have one learning rate, as the paper's: the pilot sets only the number of seeds.
"""

from olmoe_jax import studies

WITHOUT = {"losses.load_balancing_weight": 0.0}
BALANCE = "validation/load_balancing_loss"

STUDY = studies.Study(
    name="load_balancing_loss",
    question="Does balance need a load-balancing loss?",
    learning_rate_factors=(1.0,),
    max_seeds=4,
    arms=(
        studies.Arm(name="with_loss"),
        studies.Arm(name="without", changes=WITHOUT),
        studies.Arm(name="loss_free", changes=WITHOUT | {"model.router_bias": True}),
    ),
    outcomes=(
        studies.Outcome(
            arm="without", against="with_loss", expected="higher",
            paper="3.787 against 3.711 on C4",
        ),
        studies.Outcome(
            arm="loss_free", against="with_loss", expected="equal",
            paper="ln(9.599 / 9.604) = -0.0005 with softmax scores, arXiv 2408.15664",
        ),
        studies.Outcome(
            arm="without", against="with_loss", metric=BALANCE, expected="higher",
            paper="2.8 to 4.3 against 1.0", smallest_effect=0.05,
        ),
        studies.Outcome(
            arm="loss_free", against="without", metric=BALANCE, expected="lower",
            smallest_effect=0.05,
        ),
        studies.Outcome(
            arm="without", against="with_loss", metric="validation/dead_experts",
            expected="higher", paper="six of eight dead against none", smallest_effect=0.5,
        ),
    ),
)  # fmt: skip
