#!/usr/bin/env bash
# Downloads the wheels with which tools/gpu_proof.py runs on a bare machine that has torch and transformers.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/gpu_proof_kit.sh [--python 3.12] [--out gpu-proof-kit] [--max-mib 60]

Writes a folder of wheels for Linux on x86-64 and the given Python, with the versions of constraints/cpu.txt. A wheel
larger than --max-mib is split; tools/gpu_proof.py joins it. The machine with the GPU needs torch, triton, transformers
and safetensors of its own, the repository and this folder, and no network:

  python tools/gpu_proof.py --minutes 12 --wheels gpu-proof-kit

Packages come from where pip is configured to find them. Needs Python 3.11 to 3.13 with pip; nothing is installed.
Exit code: 0 done, 1 a download failed, 2 wrong arguments.
TEXT
}

die() { # die EXIT_CODE MESSAGE
    echo "gpu_proof_kit.sh: $2" >&2
    exit "$1"
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
target=3.12 out=gpu-proof-kit max_mib=60
while (($#)); do
    case $1 in
        --python | --out | --max-mib)
            [[ $# -ge 2 ]] || die 2 "$1 needs a value; see launch/gpu_proof_kit.sh --help"
            case $1 in
                --python) target=$2 ;;
                --out) out=$2 ;;
                --max-mib) max_mib=$2 ;;
            esac
            shift 2
            ;;
        -h | --help)
            usage
            exit 0
            ;;
        *) die 2 "unknown argument $1; see launch/gpu_proof_kit.sh --help" ;;
    esac
done
[[ $target =~ ^3\.1[1-3]$ ]] || die 2 "--python $target: must be 3.11, 3.12 or 3.13"
[[ $max_mib =~ ^[1-9][0-9]*$ ]] || die 2 "--max-mib $max_mib: must be a positive number of MiB"
[[ ! -e $out ]] || die 2 "--out $out exists already; name another folder or delete it"

# What the check imports and neither torch nor transformers requires. Megatron imports psutil when it saves. A checkpoint has digests of xxhash.
names=(megatron-core pydantic pydantic_core annotated-types typing-inspection typing_extensions psutil xxhash)
requirements=()
for name in "${names[@]}"; do
    pin=$(grep -iE "^$name==" "$root/constraints/cpu.txt") || die 1 "constraints/cpu.txt has no version of $name"
    requirements+=("${pin%% *}")
done
platforms=()
for tag in manylinux_2_{28,27,26,25,24,17,12,5}_x86_64 manylinux2014_x86_64 manylinux2010_x86_64 manylinux1_x86_64; do
    platforms+=(--platform "$tag")
done

python=""
for candidate in "${GRPO_MEGA_VENV:-$root/.venv}/bin/python" python3.12 python3.11 python3.13 python3; do
    if "$candidate" -m pip --version >/dev/null 2>&1; then
        python=$candidate
        break
    fi
done
[[ -n $python ]] || die 1 "no Python with pip was found"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# The wheels are for the other machine's Python; megatron-core states a newer one than its wheels need.
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --ignore-requires-python \
    --implementation cp --python-version "$target" --abi "cp${target/./}" --abi abi3 --abi none "${platforms[@]}" \
    --dest "$work/wheels" "${requirements[@]}" || die 1 "pip could not download the wheels; its message is above"
PYTHONPATH=$root "$python" "$root/tools/wheel_parts.py" cut "$work/wheels" "$out" --max-mib "$max_mib"
echo "wrote $out: ${#requirements[@]} packages for Python $target, $(du -sm "$out" | cut -f1) MiB"
