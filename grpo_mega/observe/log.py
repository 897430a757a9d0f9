"""Logging of one rank: all of it in the rank's file, on the screen what a person needs.

The screen shows INFO of rank 0 and WARNING of the others, each message behind the coordinates of its rank. Libraries
are heard from WARNING on, in the same form. Before the run folder is known there is only the screen.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TextIO

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

_FILE_FORMAT = "%(asctime)s.%(msecs)03d {prefix} %(levelname)s %(name)s: %(message)s"
_installed: list[logging.Handler] = []


def configure_logging(rank: int, coordinates: str = "", log_dir: Path | None = None) -> None:
    """Set up the root logger of this process; a second call replaces what the first one set up.

    Args:
        coordinates: Like `dp 1/2 pp 0/2 tp 1/2`; empty before the layout is known.
        log_dir: Folder of `rank_00000.log`, which is appended to; None: only the screen.
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
        file.setFormatter(logging.Formatter(_FILE_FORMAT.format(prefix=prefix), datefmt="%Y-%m-%d %H:%M:%S"))
        _installed.append(file)
        # Deprecations of libraries are for their authors: kept in the file, but off the screen.
        screen.addFilter(lambda record: record.name != "py.warnings")
    for handler in _installed:
        root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    quiet_libraries()


def quiet_libraries() -> None:
    """Let libraries speak from WARNING on, through the handlers of this module.

    Some set up their loggers when they are imported, or again later (vLLM: when an engine is made): call it after that.
    """
    for name in NOISY_LIBRARIES:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(max(logger.level, logging.WARNING))  # one that is set to ERROR stays there


class _ScreenHandler(logging.StreamHandler[TextIO]):
    """Writes to what `sys.stderr` is at that moment: a live display stands in for it while it is shown."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]  # the base class keeps the stream it was made with
        return sys.stderr


class _ScreenFormatter(logging.Formatter):
    def __init__(self, prefix: str) -> None:
        super().__init__()
        self._prefix = prefix

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno < logging.WARNING else f"{record.levelname} "
        return f"{self._prefix} {level}{super().format(record)}"
