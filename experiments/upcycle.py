"""A dense model → a Mixture of Experts that trains, ports and loads like any other.

    python -m experiments.upcycle --input=runs/dense --output=moe --num_experts=8 \
        --num_experts_per_token=2 --method=normalized
    python -m experiments.train --config=experiments/configs/upcycled.py:moe --workdir=runs/moe

`--input` is a dense model: a run's workdir (its newest checkpoint), one checkpoint, a step of its
`resume/`, what port_weights wrote, or a Hugging Face folder. Which method computes what the dense
model did, and how exactly: `olmoe_jax/upcycling/recipe.py`. If the command is killed, run it again:
it keeps what is finished.
"""

import shlex

from absl import flags

from experiments import app
from olmoe_jax.upcycling import recipe as recipe_lib
from olmoe_jax.upcycling import upcycle

_INPUT = flags.DEFINE_string("input", None, "Directory of the dense model.")
_OUTPUT = flags.DEFINE_string("output", None, "Directory to create.")
_EXPERTS = flags.DEFINE_integer("num_experts", None, "Experts of each MoE layer.")
_CHOSEN = flags.DEFINE_integer("num_experts_per_token", None, "Of them, how many compute a token.")
_METHOD = flags.DEFINE_enum(
    "method", recipe_lib.REFERENCE, recipe_lib.METHODS,
    "reference: raw softmax weights, another function; normalized: weights that sum to 1, the same "
    "function; scaled: raw weights, small router, scaled w_down, the same function.",
)  # fmt: skip
_GRANULARITY = flags.DEFINE_integer(
    "granularity", 1, "Parts into which the FFN is cut; experts are whole sets of them."
)
_DIVERSIFY = flags.DEFINE_enum(
    "diversify", recipe_lib.NONE, recipe_lib.DIVERSIFY,
    "noise: replace entries of the experts by N(0, 0.02); drop: re-initialise hidden units.",
)  # fmt: skip
_FRACTION = flags.DEFINE_float("fraction", 0.5, "How much --diversify replaces.")
_SHARED = flags.DEFINE_bool("shared_expert", False, "Copy the FFN into a shared expert too.")
_EVERY = flags.DEFINE_integer("moe_every", 1, "Which layers become MoE: 2 is every second one.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the router and of --diversify.")
_OPTIMIZER = flags.DEFINE_enum(
    "optimizer_state", upcycle.RESET, upcycle.OPTIMIZER_STATE,
    "carry: the moments too, for training.initial_optimizer_state.",
)  # fmt: skip


def main(argv):
    """Upcycles, and prints the line to paste next."""
    del argv
    for flag in (_INPUT, _OUTPUT, _EXPERTS, _CHOSEN):
        if flag.value is None:
            raise ValueError(f"--{flag.name} is required")
    app.tune_allocator()  # slabs of equal size come and go
    recipe = recipe_lib.Recipe(
        num_experts=_EXPERTS.value, num_experts_per_token=_CHOSEN.value, method=_METHOD.value,
        granularity=_GRANULARITY.value, diversify=_DIVERSIFY.value, fraction=_FRACTION.value,
        shared_expert=_SHARED.value, moe_every=_EVERY.value, seed=_SEED.value,
    )  # fmt: skip
    result = upcycle.upcycle(
        _INPUT.value, _OUTPUT.value, recipe, optimizer_state=_OPTIMIZER.value, announce=_say
    )
    kept = f" ({result.bytes_kept / 1e9:.2f} GB kept)" if result.bytes_kept else ""
    _say(
        f"{result.path}: {result.total:,} parameters, {result.active:,} active, "
        f"{result.bytes / 1e9:.2f} GB{kept} in {result.seconds:.1f} s"
    )
    _show_next(result)
    app.write_json(result)


def _say(line):
    print(line, flush=True)


def _show_next(result):
    if (at := result.position) is not None:
        print(
            f"the dense model saw {at.step:,} steps here; its data order goes on at step "
            f"{at.start_step:,}, behind {at.windows:,} windows ({at.tokens:,} tokens)"
        )
    else:
        print("what the dense model has seen is not known: name data that is new to it")
    experiment = shlex.quote(f"experiments/configs/upcycled.py:{result.path}")
    print(f"\nnext:\n  {app.python()} -m experiments.train --config={experiment} --workdir=DIR")
    print("or, with the dense run's own experiment file and flags:")
    for flag in upcycle.train_flags(result):
        print(f"  {shlex.quote(flag)}")


if __name__ == "__main__":
    app.run(main, flags_with_json=True)
