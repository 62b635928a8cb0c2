"""One set of experts for all layers against a dense model that stores and computes as much.

Command: `python -m experiments.run_study --study=layer_shared_moe --workdir=DIR --scale=laptop`.
Paper: appendix F and figure 29 of arXiv 2409.02060: a dense model against one MoE that all layers
  share, with as many experts as layers and the load balanced over the whole model, after about
  230 B tokens: C4 2.847 (dense) against 2.871, HellaSwag 52.0 against 49.2. The dense model is
  slightly better, and sharing costs about a fifth of the throughput.

A dense model is the shared one with layer i fixed to expert i, so what is compared is whether
layers should choose. Everything but the router is equal: stored parameters, parameters that a token
meets (an expert counts in each layer), FLOPs, tokens, data. Each token takes one expert per layer.
Experts are shared and each layer has a router, as `share_experts` in the authors' code; it also has
`share_moe`, which shares the router, and the settings of the paper's run are not published.

Balance over the whole model is the convention "huggingface", which pools the layers' shares before
it multiplies; for one expert per token it has the same scale as "olmoe". The authors' code computes
it so (allenai/OLMo, Muennighoff/OLMoSE b7b312a, `batched_load_balancing_loss_shared`). The paper's
router z-loss is not known for this run; the scale's is kept.
"""

from olmoe_jax import studies


def _wide(base):
    """The FFN of the dense model: as wide as the base's experts of a token together."""
    return base.model.d_ff * base.model.num_experts_per_token


STUDY = studies.Study(
    name="layer_shared_moe",
    question="Should layers choose from one common set of experts, or have an FFN each?",
    common={"model.d_ff": _wide},
    arms=(
        studies.Arm(
            name="dense",
            changes={
                "model.num_experts": 0,
                "model.num_experts_per_token": 0,
                "losses.load_balancing_weight": 0.0,
                "losses.router_z_weight": 0.0,
            },
        ),
        studies.Arm(
            name="shared",
            changes={
                "model.num_experts": lambda base: base.model.num_layers,
                "model.num_experts_per_token": 1,
                "model.share_experts_across_layers": True,
                "losses.load_balancing_convention": "huggingface",
            },
        ),
    ),
    outcomes=(
        studies.Outcome(
            arm="shared", against="dense", expected="higher",
            paper="2.871 against 2.847 on C4 after 230 B tokens",
        ),
    ),
)  # fmt: skip
