"""A process of its own for what a test's process could not do and stay as it is, such as pretending to be ranks."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def one_process() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def run(pool: ProcessPoolExecutor, function: Callable[..., Any], *args: Any) -> Any:
    """What a function of a module returns there; its traceback, where it fails."""
    return pool.submit(_told, function, args).result(timeout=300)


def _told(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    try:
        return function(*args)
    except Exception:
        raise AssertionError(traceback.format_exc()) from None
