"""Runs that differ in one thing, at equal cost, over several seeds, and a verdict with uncertainty.

`declaration` says what a study is and `equality` what its arms hold equal; `plans` which runs that
makes; `pilot` and `protocol` fix learning rates, seeds and question; `runner` makes the runs,
`results` reads them back, `statistics` and `verdict` decide, `report` writes it down.
"""

from olmoe_jax.studies.declaration import Arm, Outcome, Study

__all__ = ["Arm", "Outcome", "Study"]
