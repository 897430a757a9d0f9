"""A separate process for functions of tests that change process-wide state such as the rank."""

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
    """Yield a pool of one fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def run(pool: ProcessPoolExecutor, function: Callable[..., Any], *args: Any) -> Any:
    """Return the result of a module-level function; if it fails, raise AssertionError with its traceback."""
    return pool.submit(_call, function, args).result(timeout=300)


def _call(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    try:
        return function(*args)
    except Exception:
        raise AssertionError(traceback.format_exc()) from None
