"""Logging of one rank: everything to the file of the rank, a selection to the screen.

The screen shows INFO of rank 0 and WARNING of the other ranks. Each message starts with the coordinates of its rank.
Messages of libraries are shown from WARNING on, in the same format. A warning that repeats is shown once, then with its
count. Control characters in a message are escaped, so that no text of a model controls the terminal. Before the run
folder is known, only the screen is used. Asserted by tests/unit/observe/test_log.py.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from pathlib import Path
from typing import TextIO

from grpo_mega.observe.safe_text import printable

NOISY_LIBRARIES = (
    "vllm",
    "megatron",
    "transformers",
    "torch",
    "filelock",
    "urllib3",
    "asyncio",
    "fsspec",
    "matplotlib",
    "tensorboard",
    "numexpr",
)

FILE_ONLY = {"file_only": True}
"""`extra` of a message that the screen shows in another way already."""
_MAX_WARNINGS = 1000  # different ones that are counted
_FILE_FORMAT = "%(asctime)s.%(msecs)03d {prefix} %(levelname)s %(name)s: %(message)s"
_installed: list[logging.Handler] = []


def configure_logging(rank: int, coordinates: str = "", log_dir: Path | None = None) -> None:
    """Set up the root logger of this process; a second call replaces the handlers of the first.

    Args:
        rank: rank of this process.
        coordinates: for example `dp 1/2 pp 0/2 tp 1/2`; empty before the layout is known.
        log_dir: folder of `rank_00000.log`, to which messages are appended; None: screen only.
    """
    root = logging.getLogger()
    for handler in _installed:
        root.removeHandler(handler)
        handler.close()
    _installed.clear()
    prefix = f"[rank {rank} | {coordinates}]" if coordinates else f"[rank {rank}]"
    screen = _ScreenHandler()
    screen.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    screen.setFormatter(_ScreenFormatter(prefix))
    _installed.append(screen)
    if log_dir is not None:
        log_dir.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(log_dir / f"rank_{rank:05d}.log", encoding="utf-8", errors="backslashreplace")
        file.setFormatter(_Formatter(_FILE_FORMAT.format(prefix=prefix), datefmt="%Y-%m-%d %H:%M:%S"))
        _installed.append(file)
        # Deprecation warnings of libraries are written to the file only.
        screen.addFilter(lambda record: record.name != "py.warnings")
    screen.addFilter(lambda record: not getattr(record, "file_only", False))
    screen.addFilter(screen.is_due)
    for handler in _installed:
        root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    quiet_libraries()


def quiet_libraries() -> None:
    """Limit libraries to WARNING and route their messages through the handlers of this module.

    Some libraries set up their loggers at import or later (vLLM: when an engine is created). Call this after that.
    """
    for name in NOISY_LIBRARIES:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(max(logger.level, logging.WARNING))  # a library that is set to ERROR keeps ERROR


class _ScreenHandler(logging.StreamHandler[TextIO]):
    """Handler that shows a repeated warning the first, 10th, 100th, ... time, and its count when it is closed.

    It looks up `sys.stderr` for every message, because a live display replaces it temporarily.
    """

    def __init__(self) -> None:
        logging.Handler.__init__(self)
        self._counts: Counter[tuple[str, str]] = Counter()

    @property
    def stream(self) -> TextIO:  # type: ignore[override]  # the base class stores its stream
        return sys.stderr

    def is_due(self, record: logging.LogRecord) -> bool:
        """Count a warning; return True if this message is shown."""
        key = (record.name, record.getMessage())
        if record.levelno != logging.WARNING or (key not in self._counts and len(self._counts) >= _MAX_WARNINGS):
            return True
        self._counts[key] += 1
        record.repeats = self._counts[key]
        return str(self._counts[key]).strip("0") == "1"

    def close(self) -> None:
        """Show the counts of repeated warnings."""
        repeated = [(name, text, count) for (name, text), count in self._counts.items() if count > 1]
        self._counts.clear()
        for name, text, count in repeated:
            record = logging.LogRecord(name, logging.WARNING, "", 0, "%s", (text,), None)
            record.repeats = count
            logging.StreamHandler.emit(self, record)
        super().close()


class _Formatter(logging.Formatter):
    """Formatter that escapes control characters; lines stay lines."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class _ScreenFormatter(_Formatter):
    def __init__(self, prefix: str) -> None:
        super().__init__()
        self._prefix = prefix

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno < logging.WARNING else f"{record.levelname} "
        repeats: int = getattr(record, "repeats", 1)
        times = f" ({repeats} times)" if repeats > 1 else ""
        return f"{self._prefix} {level}{super().format(record)}{times}"
