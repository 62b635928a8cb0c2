"""Declarations of studies, one file each, ending with `STUDY = studies.Study(…)`.

python -m experiments.run_study --study=NAME --workdir=DIR --scale=laptop
"""
