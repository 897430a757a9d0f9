"""Calls of an engine whose own failures can be told from errors of what uses the engine.

Engines can be built again after a failure. A wrong reward or environment fails again with any engine, so such an error
must end the run instead. Asserted by tests/unit/rollout/test_async_sampler.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from grpo_mega.rollout.sampler import Generator
from grpo_mega.types import Completion, Prompt, SamplingRequest


class EngineCallError(RuntimeError):
    """A call of the engine failed. Its cause is the error of the engine."""


@dataclass(frozen=True)
class MarkedEngine:
    """`Generator` that raises EngineCallError for failures of `engine`, and leaves all other errors as they are."""

    engine: Generator

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingRequest,
        on_completion: Callable[[int, int, Completion], None] | None = None,
    ) -> list[list[Completion]]:
        """Sample; the contract is `Engine.generate`.

        Raises:
            EngineCallError: the engine failed.
            ValueError: the request is wrong.
            Exception: the exception that `on_completion` raised.
        """
        errors: list[BaseException] = []

        def report(position: int, member: int, completion: Completion) -> None:
            if on_completion is None:
                return
            try:
                on_completion(position, member, completion)
            except BaseException as error:
                errors.append(error)
                raise

        try:
            return self.engine.generate(prompts, sampling, report)
        except ValueError:
            raise
        except Exception as error:  # engines raise anything
            if any(error is each for each in errors):
                raise
            raise EngineCallError(f"{type(error).__name__}: {error}") from error
