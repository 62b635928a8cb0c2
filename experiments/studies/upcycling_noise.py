"""Upcycling with noise in the experts against upcycling with exact copies.

Command: `python -m experiments.run_study --study=upcycling_noise --workdir=DIR --scale=laptop`.
Paper: appendix F and figure 28 of arXiv 2409.02060: each entry of the copied FFNs is replaced by
  one of N(0, 0.02) with probability 1/2. After about 750 B tokens C4 2.591 without noise against
  2.644 with it (the mean of a curve with spikes), HellaSwag 65.9 against 64.1: not better.

Both arms start, for each seed, from the same dense model of that seed, with the same router, and go
on with the data behind it; the dense model is the one of the study `upcycling`. Half of the entries
noise is `--diversify=noise` of `experiments.upcycle`, which also replaces those of w_down; in the
authors' script that is an option whose value in this run is not known. At a width other than the
paper's, 0.02 is another share of a trained weight's size.
"""

from experiments.studies import upcycling as upcycling_study
from olmoe_jax import studies
from olmoe_jax.upcycling import recipe as recipe_lib
from olmoe_jax.upcycling import upcycle

_NUM_EXPERTS, _NUM_EXPERTS_PER_TOKEN = 8, 2
_DENSE = "dense"


def _converted(diversify):
    """An arm's `convert`: upcycles as the paper did, with this diversification."""

    def convert(source, target, config):
        recipe = recipe_lib.Recipe(
            num_experts=_NUM_EXPERTS, num_experts_per_token=_NUM_EXPERTS_PER_TOKEN,
            diversify=diversify, seed=config.training.seed,
        )  # fmt: skip
        upcycle.upcycle(source, target, recipe)

    return convert


def _upcycled(name, diversify):
    return studies.Arm(
        name=name, starts_from=_DENSE, convert=_converted(diversify),
        changes={
            "model.num_experts": _NUM_EXPERTS,
            "model.num_experts_per_token": _NUM_EXPERTS_PER_TOKEN,
            "data.start_step": upcycling_study.dense_steps,
        },
    )  # fmt: skip


STUDY = studies.Study(
    name="upcycling_noise",
    question="Does noise in the copied experts help an upcycled Mixture of Experts?",
    base=upcycling_study.BASES,
    arms=(
        studies.Arm(
            name=_DENSE,
            changes={
                "losses.load_balancing_weight": 0.0,
                "losses.router_z_weight": 0.0,
                "training.num_steps": upcycling_study.dense_steps,
            },
        ),
        _upcycled("copies", recipe_lib.NONE),
        _upcycled("noise", recipe_lib.NOISE),
    ),
    outcomes=(
        studies.Outcome(
            arm="noise", against="copies", expected="higher",
            paper="2.644 against 2.591 on C4 after some 750 B tokens",
        ),
    ),
)  # fmt: skip
