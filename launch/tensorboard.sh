#!/usr/bin/env bash
# Show a run folder, or a folder of run folders, in the browser.
set -euo pipefail

if [[ ${1-} == -h || ${1-} == --help || $# -eq 0 ]]; then
    echo "usage: launch/tensorboard.sh RUN_DIR [tensorboard arguments]" >&2
    [[ $# -gt 0 ]] && exit 0 || exit 2
fi
if [[ ! -d $1 ]]; then
    echo "tensorboard.sh: RUN_DIR=$1 is not a folder; name a folder that launch/train.sh created, such as runs/quickstart" >&2
    exit 2
fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
"$here/setup.sh"
# shellcheck source=launch/env.sh
source "$here/env.sh"
exec python -m tensorboard.main --logdir "$1" "${@:2}"
