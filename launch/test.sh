#!/usr/bin/env bash
# All tests that need no GPU, but for the long tier. Arguments go to pytest.
set -euo pipefail

if [[ ${1-} == -h || ${1-} == --help ]]; then
    cat <<'TEXT'
usage: launch/test.sh [--all] [pytest arguments]

Builds the environment if there is none, then runs the tests; --all adds the long tier. Tests that need a GPU are
skipped with the reason where there is none.
TEXT
    exit 0
fi

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
"$here/setup.sh" --with tests
# shellcheck source=launch/env.sh
source "$here/env.sh"

selection=(-m "not long")
arguments=()
for argument in "$@"; do
    if [[ $argument == --all ]]; then selection=(); else arguments+=("$argument"); fi
done
cd "$here/.."
unset PYTHONDONTWRITEBYTECODE # hundreds of processes import thousands of modules, and each would compile them again
# Two workers; which tests stay together, and in what order they start, is in tests/conftest.py.
exec python -m pytest --numprocesses=2 --dist=loadscope --no-loadscope-reorder ${selection[@]+"${selection[@]}"} ${arguments[@]+"${arguments[@]}"}
