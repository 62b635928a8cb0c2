"""Runs that differ in one thing, at equal cost, over several seeds, and a verdict with uncertainty.

`declaration` says what a study is and `equality` what its arms hold equal; `runner` makes the runs,
`protocol` fixes learning rates and seeds before them; `results` reads them back, `statistics` and
`verdict` decide, `report` writes it down.
"""

from olmoe_jax.studies.declaration import Arm, Outcome, Study

__all__ = ["Arm", "Outcome", "Study"]
