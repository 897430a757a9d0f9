"""Environment variables of a job that is started without `launch/env.sh`; a test compares both lists."""

from __future__ import annotations

import os

# launch/env.sh gives the reason for each. Values that the user has set are kept.
PROCESS_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def set_process_environment() -> None:
    """Set the variables of a job in this process, for the processes that it starts."""
    for name, value in PROCESS_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
