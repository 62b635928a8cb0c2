"""The load-balancing loss over a device's few sequences, or over the whole batch.

Command: `python -m experiments.run_study --study=load_balancing_scope --workdir=DIR
  --scale=laptop`; the pilot before it with `--pilot`.
Paper: none of OLMoE, whose loss is over the 4 sequences of a device. Qiu et al. (arXiv 2501.11873)
  find the loss over the global batch better in perplexity and downstream, and experts more
  specialised: over few sequences the loss demands balance even within one domain.

`local` takes the base's group (4 sequences at scale `paper`), or single sequences where the base
has none; `global` the whole batch. The logged load-balancing loss of an arm is over its own groups
and so cannot be compared between these arms.
"""

from olmoe_jax import studies

STUDY = studies.Study(
    name="load_balancing_scope",
    question="Over what should the load be balanced: a device's share, or the whole batch?",
    arms=(
        studies.Arm(
            name="local",
            changes={
                "losses.load_balancing_group": lambda base: base.losses.load_balancing_group or 1
            },
        ),
        studies.Arm(name="global", changes={"losses.load_balancing_group": 0}),
    ),
    outcomes=(
        studies.Outcome(
            arm="global", against="local", expected="lower",
            paper="better over the global batch, arXiv 2501.11873",
        ),
    ),
)  # fmt: skip
