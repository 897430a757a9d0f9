"""A stub of engines/sglang/engine_process.py: same protocol, no SGLang, and a fault chosen by its settings."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


def main(descriptor: int) -> None:
    connection = Connection(descriptor)
    settings = connection.recv()
    fault = settings.arguments["fault"]
    sys.stderr.write(f"settings arrived: {fault}\n")
    sys.stderr.flush()
    if fault == "start":
        os._exit(3)
    child = subprocess.Popen(["sglang::scheduler", "600"], executable="/bin/sleep")
    while not Path(f"/proc/{child.pid}/cmdline").read_text():
        time.sleep(0.01)  # it is empty for a moment
    connection.send(("done", None))
    while True:
        command, arguments = connection.recv()
        if command == "end":
            child.kill()
            connection.send(("done", None))
            return
        if command == "environment":
            connection.send(("done", dict(os.environ)))
        elif command == "child":
            connection.send(("done", child.pid))
        elif command == "fail":
            connection.send(("failed", "ValueError: wrong argument"))
        elif command == "stall":
            time.sleep(600)
        elif command == "die":
            os._exit(4)
        elif command == "count":
            _count(connection, *arguments)


def _count(connection: Connection, last: int, pause_seconds: float) -> None:
    value: Any
    for value in range(last):
        time.sleep(pause_seconds)
        connection.send(("part", value))
    connection.send(("done", None))


if __name__ == "__main__":
    main(int(sys.argv[1]))
