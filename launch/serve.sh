#!/usr/bin/env bash
# An engine server for jobs with engine.placement=server: builds the environment if there is none, then serves.
set -euo pipefail

if [[ ${1-} == -h || ${1-} == --help ]]; then
    cat <<'TEXT'
usage: launch/serve.sh CONFIG [section.key=value ...] [--host ADDRESS] [--port PORT]

Starts one engine replica (engine.tp ranks) of the job that CONFIG describes and prints the address at which it listens.
Give each server the devices that are its own (CUDA_VISIBLE_DEVICES). Then train with the same CONFIG and overrides:

  launch/train.sh CONFIG engine.placement=server engine.urls=[HOST:PORT,...]

A server serves one job after the other, and ends on SIGTERM or Ctrl-C. By default only this machine reaches it; with
--host (0.0.0.0: every interface) both sides need the same secret, of 16 characters or more, in a file that
GRPO_MEGA_SERVER_TOKEN_FILE names, or in GRPO_MEGA_SERVER_TOKEN. The secret keeps strangers out and hides nothing.

Variables: GRPO_MEGA_VENV (the environment's folder), OMP_NUM_THREADS, and those of launch/env.sh.
Exit code: 0 asked to end, 2 wrong input (one message says what to change), 1 a failure.
TEXT
    exit 0
fi

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
"$here/setup.sh"
# shellcheck source=launch/env.sh
source "$here/env.sh"
exec python -m grpo_mega.serve "$@"
