#!/usr/bin/env bash
# Show a run folder, or a folder of run folders, in the browser.
set -euo pipefail

if [[ ${1-} == -h || ${1-} == --help || $# -eq 0 ]]; then
    echo "usage: launch/tensorboard.sh RUN_DIR|PARENT [tensorboard arguments]" >&2
    echo "Shows one run, or all runs below a folder, at http://127.0.0.1:6006 on this machine only; other addresses: --bind_all." >&2
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
address=(--host 127.0.0.1)
for argument in "${@:2}"; do
    case $argument in --host | --host=* | --bind_all | --bind_all=*) address=() ;; esac
done
# By default TensorBoard keeps 1,000 points of a curve and 10 texts.
echo "The dashboard is the tab \"Custom Scalars\"." >&2
exec python -m tensorboard.main --logdir "$1" "${address[@]}" --samples_per_plugin "scalars=5000,text=200" "${@:2}"
