# Sourced by the other scripts: the environment variables of every process of a job. What the user has set stays.
# OMP_NUM_THREADS and the variables of a rank are set by grpo_mega/launch.py, which knows the ranks of this machine.

# Models and tokenizers are read from folders; a mistyped path must fail at once, not after a search in the network.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
# The tokenizers' own threads deadlock when a process forks after using them, as the pool of reward workers does.
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
# vLLM in the process of the rank: weights are then written into it directly.
export VLLM_ENABLE_V1_MULTIPROCESSING="${VLLM_ENABLE_V1_MULTIPROCESSING:-0}"
# On CPU vLLM would bind each rank's threads to the same first cores; the ranks share them with the policy.
export VLLM_CPU_OMP_THREADS_BIND="${VLLM_CPU_OMP_THREADS_BIND:-nobind}"
# GiB of KV cache per rank on CPU; unset, vLLM takes half of the machine's memory, for every rank.
export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}"
# The engine's own progress messages would bury those of the run.
export VLLM_LOGGING_LEVEL="${VLLM_LOGGING_LEVEL:-ERROR}"
# No usage report leaves the machine.
export VLLM_NO_USAGE_STATS="${VLLM_NO_USAGE_STATS:-1}"
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
