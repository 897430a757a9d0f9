# Environment variables of every process of a job; sourced by the other scripts. Variables set by the user are kept.
# grpo_mega/launch/main.py sets the variables of each rank.

# One thread per rank, as with torchrun. On CPU the models are small: with two threads on two cores a quickstart step takes
# 1.8 times as long as with one (docs/measurements/quickstart.md).
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Suppresses PyTorch's C++ warning about NUMA binding on every rank, which users cannot act on.
export TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}"
# Progress bars of the libraries that write files would interrupt the progress display of the run.
export HF_HUB_DISABLE_PROGRESS_BARS="${HF_HUB_DISABLE_PROGRESS_BARS:-1}"
# The threads of tokenizers deadlock if a process forks after using them, as checkpoint writers do.
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"

grpo_mega_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Import the code of this checkout from any working folder, even if several checkouts share one environment.
export PYTHONPATH="$grpo_mega_root${PYTHONPATH:+:$PYTHONPATH}"
# The project's container images have one Python, on PATH; elsewhere use the Python of the environment.
if [[ -e /opt/grpo_mega/environment ]]; then
    grpo_mega_bin=$(dirname "$(command -v python3)")
else
    grpo_mega_bin=${GRPO_MEGA_VENV:-$grpo_mega_root/.venv}/bin
fi
export PATH="$grpo_mega_bin:$PATH"
