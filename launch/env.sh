# Sourced by the other scripts: the environment variables of every process of a job. What the user has set stays.
# The variables of a rank are set by grpo_mega/launch/main.py, which knows the ranks of this machine.

# One thread a rank, as torchrun does. On CPU the models are small: with two threads on two cores a quickstart step takes
# 1.8 times as long as with one (docs/measurements/quickstart.md).
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# PyTorch's C++ warning about NUMA binding, once for every rank, says nothing that a user could change.
export TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}"
# Models and tokenizers are read from folders; a mistyped path must fail at once, not after a search in the network.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
# Files are written in a moment; the bars of the libraries that write them would break up our own display.
export HF_HUB_DISABLE_PROGRESS_BARS="${HF_HUB_DISABLE_PROGRESS_BARS:-1}"
# The tokenizers' own threads deadlock when a process forks after using them, as checkpoint writers do.
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
# Megatron's tensor-parallel overlap relies on the order in which kernels reach a device: one queue.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"

grpo_mega_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# This checkout's code, also where several checkouts share one environment, and from any working folder.
export PYTHONPATH="$grpo_mega_root${PYTHONPATH:+:$PYTHONPATH}"
# The project's own images have one Python, on PATH; elsewhere it is the one of the environment.
if [[ -e /opt/grpo_mega/environment ]]; then
    grpo_mega_bin=$(dirname "$(command -v python3)")
else
    grpo_mega_bin=${GRPO_MEGA_VENV:-$grpo_mega_root/.venv}/bin
fi
export PATH="$grpo_mega_bin:$PATH"
