#!/bin/bash
# One job per run of a study; they share the work through WORKDIR. Run from the checkout:
#   sbatch --array=0-5 experiments/studies/slurm_array.sh moe_vs_dense WORKDIR laptop "dense moe" "1 2 3"
# (arms × seeds jobs); what stands behind, such as --data=DIR, is passed on. The job that makes the
# last run writes the report. If none did:
#   python -m experiments.run_study --study=moe_vs_dense --workdir=WORKDIR --scale=laptop --seeds=1,2,3 [--data=DIR]
# A job that was killed resumes when it is submitted again; a run that is done costs nothing.
#SBATCH --job-name=study
#SBATCH --ntasks=1
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
set -euo pipefail

study=$1 workdir=$2 scale=$3
read -ra arms <<<"$4"
read -ra seeds <<<"$5"
task=$SLURM_ARRAY_TASK_ID
arm=${arms[task % ${#arms[@]}]}
seed=${seeds[task / ${#arms[@]}]}
all_seeds=$(IFS=,; echo "${seeds[*]}")

# exec: the signal above reaches the run itself, which saves its state and ends
exec python -m experiments.run_study --study="$study" --workdir="$workdir" --scale="$scale" \
  --seeds="$all_seeds" "${@:6}" --arm="$arm" --seed="$seed"
