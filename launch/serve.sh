#!/usr/bin/env bash
# Start an engine server for jobs with engine.placement=server. Builds the environment first if it does not exist.
set -euo pipefail

if [[ ${1-} == -h || ${1-} == --help ]]; then
    cat <<'TEXT'
usage: launch/serve.sh CONFIG [section.key=value ...] [--host ADDRESS] [--port PORT]

Starts one engine replica (engine.tp ranks) for the job that CONFIG describes, and prints the address at which it
listens. Give each server its own devices (CUDA_VISIBLE_DEVICES). Then train with the same CONFIG and overrides:

  launch/train.sh CONFIG engine.placement=server engine.urls=[HOST:PORT,...]

A server serves one job after the other, and exits on SIGTERM or Ctrl-C. By default it listens for this machine only.
With --host (0.0.0.0: every interface) both sides need the same secret of at least 16 characters, in a file named by
GRPO_MEGA_SERVER_TOKEN_FILE or in GRPO_MEGA_SERVER_TOKEN. Both sides authenticate each other with it; commands and
rollouts are encrypted, weights are not.

Variables: GRPO_MEGA_VENV (the environment's folder), OMP_NUM_THREADS, and those of launch/env.sh.
Exit code: 0 SIGTERM, 1 failure, 2 wrong input (one message says what to change), 130 Ctrl-C.
TEXT
    exit 0
fi

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
"$here/setup.sh"
# shellcheck source=launch/env.sh
source "$here/env.sh"
exec python -m grpo_mega.serve "$@"
