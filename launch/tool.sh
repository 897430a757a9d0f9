#!/usr/bin/env bash
# Run a tool of tools/ in the project's environment. Builds the environment first if it does not exist.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

names() { # the names of all tools, in one line
    local file
    for file in "$here"/../tools/*.py; do basename "$file" .py; done | paste -sd ' '
}

if [[ ${1-} == -h || ${1-} == --help ]]; then
    cat <<TEXT
usage: launch/tool.sh NAME [arguments]

Runs tools/NAME.py in the environment of launch/setup.sh, in the current folder. launch/tool.sh NAME --help describes a
tool. Names: $(names)

Exit code: that of the tool; 2 for an unknown name.
TEXT
    exit 0
fi

name=${1-}
name=${name##*/}
name=${name%.py}
name=${name//-/_}
if [[ -z $name || ! -f $here/../tools/$name.py ]]; then
    echo "tool.sh: NAME=${1-} is not a tool; use one of $(names)" >&2
    exit 2
fi
shift
"$here/setup.sh"
# shellcheck source=launch/env.sh
source "$here/env.sh"
exec python "$here/../tools/$name.py" "$@"
