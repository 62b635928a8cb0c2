"""RMS norm with a trained scale, or LayerNorm without parameters.

Command: `python -m experiments.run_study --study=norm_type --workdir=DIR --scale=laptop`; the pilot
  before it with `--pilot`.
Paper: figures 14 and 16 of arXiv 2409.02060: about 110 B tokens: validation loss on C4, read off
  the figure, 2.694 with RMS norm against 2.726; training loss 2.372 against 2.398; fewer spikes of
  the gradient's norm, at 15 % of the throughput.

The scales are parameters that only one arm has, so parameters are not held equal. QK-norm, where
the base has it, is an RMS norm in both arms.
"""

from olmoe_jax import studies

STUDY = studies.Study(
    name="norm_type",
    question="RMS norm with a scale, or LayerNorm without parameters?",
    arms=(
        studies.Arm(name="rmsnorm", changes={"model.norm": "rmsnorm"}),
        studies.Arm(name="layernorm", changes={"model.norm": "layernorm_nonparametric"}),
    ),
    equal=("flops_per_token", "tokens", "data_order"),
    outcomes=(
        studies.Outcome(
            arm="rmsnorm", against="layernorm", expected="lower", paper="2.694 against 2.726 on C4",
        ),
    ),
)  # fmt: skip
