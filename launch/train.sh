#!/usr/bin/env bash
# Start a training job. Builds the environment first if it does not exist; then grpo_mega/launch/main.py starts ranks.
set -euo pipefail

if [[ ${1-} == -h || ${1-} == --help ]]; then
    cat <<'TEXT'
usage: launch/train.sh [CONFIG] [section.key=value ...] [--restarts N]

Trains with CONFIG (default: configs/quickstart.yaml). Overrides look like train.steps=20 or parallel.tp=2; values are
YAML. The number of ranks is run.world_size; by default that of the launcher, else the number of GPUs, else 1.

  one machine        launch/train.sh CONFIG
  several machines   NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 launch/train.sh CONFIG     (NODE_RANK=1 on the second)
  Slurm              sbatch --nodes=2 launch/slurm.sbatch CONFIG                       (requeued when a node is lost)
                     salloc --nodes=2, then launch/train.sh CONFIG                     (it calls srun itself)
                     srun launch/train.sh CONFIG                                       (one task per node or per rank)
  torchrun           torchrun --nproc-per-node=8 -m grpo_mega.train CONFIG

Several machines may start in any order; they wait for each other for at most guard.timeout_seconds. Ctrl-C, SIGTERM or
SIGUSR1 stops the run with a checkpoint of its last complete step, and the same command continues it; a second Ctrl-C
or SIGTERM ends it at once. With --restarts N a run that failed (exit code 1) is started again, at most N times, and
continues from its newest checkpoint; give it to the launchers of all machines.

Variables: GRPO_MEGA_VENV (the environment's folder), MASTER_PORT, OMP_NUM_THREADS, and those of launch/env.sh.
Exit code: 0 done, 1 failure, 2 wrong input (one message says what to change), 130 or 143 (SIGTERM) stopped.
TEXT
    exit 0
fi

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
"$here/setup.sh"
# shellcheck source=launch/env.sh
source "$here/env.sh"

config=$here/../configs/quickstart.yaml
restarts=()
if [[ ${1-} == --restarts ]]; then # also before CONFIG
    restarts=(--restarts "${2-}")
    shift $(($# > 1 ? 2 : 1))
elif [[ ${1-} == --restarts=* ]]; then
    restarts=("$1")
    shift
fi
if (($#)) && [[ $1 != *=* && $1 != --* ]]; then
    config=$1
    shift
fi
exec python -m grpo_mega.launch "$here/train.sh" "$config" "$@" ${restarts[@]+"${restarts[@]}"}
