"""Sparse upcycling against training from scratch: the same Mixture of Experts, two beginnings.

Command: `python -m experiments.compare_upcycling --workdir=DIR --scale=laptop`, which also finds
  where the curves cross. `python -m experiments.run_study --study=upcycling --workdir=DIR --pilot`
  writes a protocol that it follows; without `--pilot` that command makes the same runs.
Paper: section 4.1.5 and figure 8 of arXiv 2409.02060: OLMo-1B after 2 T tokens, its FFN copied into
  8 experts of 8192, top-2, raw softmax weights. From scratch the MoE catches up after 500 B tokens,
  25 % of the dense budget, and is ahead from 600 B on; at 610 B: C4 2.615 against 2.620.

Each seed has its own dense model, which reads the first windows of the seed's order; both MoE runs
read those behind, so no window twice while an epoch lasts. All rates are constant after warm-up,
and the same: at every step the curves then compare models of equal training, whereas with a decay
the crossing would move with the length of the runs. (The schedule of the paper's pair is not
published.) The MoE runs are five times as long as the dense model's, so that a crossing at up to
five times its budget is seen.

The laptop scale is smaller than other studies': the question needs a dense model that has learnt
most of what it can (the paper's saw 1,700 tokens per parameter; one of OLMoE's proportions that saw
as many tokens as these would still be in its steepest part, where a head start is never made up).
Here it sees 1.2 M tokens with 86,000 parameters, 3 minutes a run.
"""

import dataclasses
import os

from olmoe_jax import config as config_lib
from olmoe_jax import presets, studies
from olmoe_jax.data import pipeline
from olmoe_jax.porting import sources
from olmoe_jax.studies import scales
from olmoe_jax.upcycling import recipe as recipe_lib
from olmoe_jax.upcycling import upcycle

UPCYCLED, SCRATCH, DENSE = "upcycled", "scratch", "dense"
_PAPER_DENSE_STEPS = 954_000  # of 512 × 4096 tokens: 2.0 T
_LONG = 1e11  # tokens from which the dense model gets the paper's budget


def _base(base):
    """The dense model's Config of a study's base: an FFN as wide as the experts of a token."""
    wide = base.model.d_ff * base.model.num_experts_per_token
    model = dataclasses.replace(base.model, d_ff=wide, num_experts=0, num_experts_per_token=0)
    return dataclasses.replace(
        base, model=model, optimizer=dataclasses.replace(base.optimizer, schedule="constant")
    )


# 610 B tokens of 512 × 4096, no QK-norm, normal initialisation; the code that trained it divides
# the router z-loss by the number of chosen experts.
_PAPER = config_lib.Config(
    model=presets.get("olmo-1b-0724", dtype="bfloat16", remat=True),
    data=config_lib.DataConfig(sequence_length=4096, validation_windows=1024),
    losses=config_lib.LossesConfig(
        load_balancing_group=4, router_z_weight=0.001 / 2, count_masked=True
    ),
    optimizer=dataclasses.replace(scales.BASES["paper"].optimizer, schedule="constant"),
    training=config_lib.TrainingConfig(num_steps=290_871, batch_size=512),
    checkpoint=config_lib.CheckpointConfig(interval=2500, dtype="bfloat16"),
    mesh=scales.BASES["paper"].mesh,
)
_laptop = scales.BASES["laptop"]
_LAPTOP = dataclasses.replace(
    _laptop,
    model=dataclasses.replace(_laptop.model, vocab_size=1024, num_layers=2, d_model=32, d_ff=8),
    optimizer=dataclasses.replace(_laptop.optimizer, learning_rate=2e-3),
    training=dataclasses.replace(_laptop.training, num_steps=3000),
    checkpoint=config_lib.CheckpointConfig(interval=100),
)
BASES = {"smoke": _base(scales.BASES["smoke"]), "laptop": _base(_LAPTOP), "paper": _PAPER}


def dense_steps(base) -> int:
    """Updates of the dense model: a fifth of the MoE runs'; of the paper's, as many as there."""
    num_steps = base.training.num_steps
    return _PAPER_DENSE_STEPS if num_steps * base.tokens_per_step > _LONG else num_steps // 5


def declare(
    *, num_experts=8, num_experts_per_token=2, method=recipe_lib.REFERENCE, dense=None,
    start_step=0, base=None, variant="",
) -> studies.Study:  # fmt: skip
    """The study, with an upcycling of one's own or a dense model that is there already.

    Args:
      num_experts, num_experts_per_token, method: of `upcycling.recipe.Recipe`.
      dense: model directory of the dense model; None: it is an arm, trained for each seed.
      start_step: with `dense`, `data.start_step` of both MoE runs.
      base: scale → Config of the dense model, instead of BASES.
      variant: of the Study, beside method and `dense`.
    Raises:
      ValueError: the recipe is not valid, or does not fit the dense model of a scale.
    """
    base = BASES if base is None else base

    def recipe(seed=0):
        return recipe_lib.Recipe(
            num_experts=num_experts, num_experts_per_token=num_experts_per_token, method=method,
            seed=seed,
        )  # fmt: skip

    for config in base.values():
        recipe_lib.moe_config(config.model, recipe(), str(dense or "the dense model"))

    def convert(source, target, config):
        upcycle.upcycle(source, target, recipe(config.training.seed))

    experts = {
        "model.num_experts": num_experts,
        "model.num_experts_per_token": num_experts_per_token,
        "model.normalize_expert_weights": method == recipe_lib.NORMALIZED,
        "data.start_step": dense_steps if dense is None else start_step,
    }
    arms = [
        studies.Arm(
            name=UPCYCLED, changes=experts, start=None if dense is None else str(dense),
            starts_from=DENSE if dense is None else None, convert=convert,
        ),
        studies.Arm(name=SCRATCH, changes=experts),
    ]  # fmt: skip
    if dense is None:
        changes = {
            "losses.load_balancing_weight": 0.0,
            "losses.router_z_weight": 0.0,
            "training.num_steps": dense_steps,
        }
        arms.insert(0, studies.Arm(name=DENSE, changes=changes))
    outcome = studies.Outcome(
        arm=UPCYCLED, against=SCRATCH, expected="higher", smallest_effect=0.02,
        paper="2.620 against 2.615 on C4 after 610 B tokens, 30 % of the dense budget",
    )  # fmt: skip
    words = [f"method={method}"] + ([] if dense is None else [f"dense={dense}"])
    return studies.Study(
        name="upcycling",
        question="Is a Mixture of Experts better started from a dense model or from nothing?",
        base=base,
        arms=tuple(arms),
        outcomes=(outcome,),
        pilot_seeds=(101, 102),
        max_seeds=6,
        variant=", ".join([*words, variant] if variant else words),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense:
    """A dense model that is there already.

    Attributes:
      base: its Config at the chosen scale: its architecture and, if it was trained here, its data
        and batch size; schedule and length are the scale's.
      start_step: `data.start_step` behind what it has seen.
      tokens: that it was trained on; None: not known.
      notes: lines that a reader should know.
    """

    base: object
    start_step: int
    tokens: int | None
    notes: tuple[str, ...]


def open_dense(directory, scale, data, tokens) -> Dense:
    """The dense model in a directory, for runs at a scale.

    Args:
      data: prepared data to use instead of its own, or None.
      tokens: that it was trained on, where it does not say so itself; or None.
    Raises:
      FileNotFoundError, ValueError: there is no model, it is a Mixture of Experts, or it does not
        say on which data its runs can go on.
    """
    source = sources.open_source(directory)
    if source.config.model.num_experts:
        raise ValueError(
            f"--dense_checkpoint={directory}: a Mixture of Experts "
            f"(num_experts={source.config.model.num_experts}); name a dense model"
        )
    position, notes = upcycle.position_of(source.path, source.config), []
    if position is not None and position.data_path is None and data is None:
        position = None  # away from its run: the data are not to be found
    own = position.data_path if position is not None else None
    path = data or own
    if path is None:
        raise ValueError(
            f"--dense_checkpoint={directory}: was not trained by a run whose data are known here: "
            "name --data, prepared with its tokenizer (experiments.prepare_data --tokenizer)"
        )
    path = os.path.abspath(os.path.expanduser(path))
    info = pipeline.open(path).info
    base = BASES[scale]
    training, start_step = base.training, 0
    if own is not None and path == os.path.abspath(own):
        start_step = position.start_step
        training = dataclasses.replace(training, batch_size=source.config.training.batch_size)
        seed = source.config.training.seed
        notes.append(
            f"the dense model read its data in the order of seed {seed}; with another seed the MoE "
            "runs read some of those windows again, which favours the upcycled one"
        )
    elif own is not None and info.tokenizer_sha256 != pipeline.open(own).info.tokenizer_sha256:
        raise ValueError(
            f"--data={path}: has another tokenizer than {own}, on which {directory} was trained; "
            "prepare it with that (experiments.prepare_data --tokenizer)"
        )
    if position is not None and source.config.training.initial_checkpoint is None:
        found = position.step * source.config.tokens_per_step
        if tokens not in (None, found):
            raise ValueError(
                f"--dense_tokens={tokens}: {directory} says that it was trained on {found}"
            )
        tokens = found
    model = dataclasses.replace(
        source.config.model, dtype=base.model.dtype, remat=base.model.remat
    )  # fmt: skip
    config = dataclasses.replace(
        base, model=model, training=training,
        data=dataclasses.replace(base.data, path=path, sequence_length=info.sequence_length),
    )  # fmt: skip
    return Dense(base=config, start_step=start_step, tokens=tokens, notes=tuple(notes))


STUDY = declare()
