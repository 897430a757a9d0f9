"""The cleaner of a run: `python -m grpo_mega.launch.cleaner FOLDER DESCRIPTOR`, started by run_temporaries.py.

It outlives the launcher, also after a SIGKILL of it. DESCRIPTOR is the reading end of a pipe that only the launcher
keeps open for writing, so its end is the end of the launcher. Asserted by tests/unit/launch/test_run_temporaries.py.
"""

from __future__ import annotations

import select
import signal
import sys
from pathlib import Path

from grpo_mega.launch.run_temporaries import SharedMemoryList, clean

_POLL_SECONDS = 0.1  # a process that is killed this soon after it made a segment leaves it behind


def main(folder: Path, descriptor: int) -> None:
    """Maintain the list of shared memory until the launcher exits, then remove what is left of the run."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    listed = SharedMemoryList(folder)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while not select.select([descriptor], [], [], _POLL_SECONDS)[0]:
        listed.update()
    listed.update()
    clean(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
