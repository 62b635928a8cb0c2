"""Does the study machine see what is there, and nothing else?

Command: `python -m experiments.run_study --study=control --workdir=DIR --scale=smoke`.

`worse` is planted: with a twentieth of the learning rate it must be declared worse. `same` changes
nothing and must not differ.
"""

from olmoe_jax import studies

STUDY = studies.Study(
    name="control",
    question="Is a planted worse arm declared worse, and an identical one not?",
    arms=(
        studies.Arm(name="base"),
        studies.Arm(name="same"),
        studies.Arm(
            name="worse",
            changes={"optimizer.learning_rate": lambda base: base.optimizer.learning_rate / 20},
        ),
    ),
    outcomes=(
        studies.Outcome(arm="worse", against="base", expected="higher"),
        studies.Outcome(arm="same", against="base", expected="equal"),
    ),
)
