"""Attention inside documents against attention over the whole window.

Command: `python -m experiments.run_study --study=document_masking --workdir=DIR --scale=laptop`.
Paper: none. arXiv 2409.02060 reports no outcome; the released ablations have two configs with
  document masking (`olmoe-8x1b-newhp-newds-cx5-fine1-docmask` and `-docmask-8k`), but their
  `eos_token_id` is 0, which no document of the data ends with, so they masked next to nothing.

Each arm is validated as it was trained. So the masked arm also predicts with less in front of it,
and the difference of losses is that of a model and its context together. The first token of a
document is a target in both. How much there is to see depends on the data: documents of the
embedded corpus have some 2,000 tokens, so about a tenth of the laptop's windows of 256 has a
border. The same FLOPs are counted for both: scores that are masked out are computed all the same.
"""

from olmoe_jax import studies

STUDY = studies.Study(
    name="document_masking",
    question="Does attention across documents in a window help or hurt?",
    arms=(
        studies.Arm(name="across"),
        studies.Arm(name="masked", changes={"data.mask_documents": True}),
    ),
    outcomes=(studies.Outcome(arm="masked", against="across"),),
)
