"""The numbers of a run: their names, and the lines of `metrics.jsonl`.

A name that is not in `METRICS` is an error: scripts and curves rely on the names. The line of a step must be written
before the checkpoint of that step is completed, or a run that is killed between the two lacks it for ever.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from typing import Self

from grpo_mega.observe.atomic_files import to_json
from grpo_mega.observe.rollouts import RolloutRow, write_rollouts
from grpo_mega.observe.run_folder import RunFolder
from grpo_mega.observe.tensorboard import TensorBoardWriter

METRICS: dict[str, str] = {
    "reward/mean": "mean reward of the step's rollouts",
    "reward/std": "standard deviation of the rewards over all rollouts of the step",
    "reward/accuracy": "share of rollouts with the right answer",
    "reward/failed_fraction": "share of rollouts where a reward timed out, crashed or was not a number",
    "reward/component/*": "mean of one reward term, before its weight",
    "rollout/length_mean": "mean completion length, in tokens",
    "rollout/length_max": "longest completion, in tokens",
    "rollout/prompt_length_mean": "mean prompt length, in tokens",
    "rollout/truncated_fraction": "share of completions cut at sampling.max_tokens",
    "rollout/tokens": "completion tokens of the step, all replicas",
    "rollout/turns_mean": "answers of the policy in a rollout; more than 1 only with an environment",
    "rollout/result_tokens": "tokens of the step that its environment wrote, part of rollout/tokens",
    "rollout/tokens_per_replica/*": "completion tokens of the step that one replica sampled",
    "group/degenerate_fraction": "share of sampled groups whose rewards are all equal: they teach nothing",
    "group/discarded": "degenerate groups that were sampled and gave their place to others; no other metric has them",
    "train/loss": "loss, mean over the step's updates",
    "train/kl": "KL divergence from the reference, in nats per token",
    "train/kl_coef": "weight of the KL divergence in loss or reward",
    "train/entropy": "entropy of the policy, in nats per token",
    "train/clip_fraction": "share of tokens whose ratio was clipped",
    "train/ratio_max": "largest ratio of a token's probability, policy over policy before the update",
    "train/grad_norm": "gradient norm before clipping, mean over the step's updates",
    "train/learning_rate": "learning rate of the step's last update",
    "train/mismatch_kl": "KL divergence between sampler and policy on the same weights, in nats per token",
    "train/mismatch_max": "largest |old_log_probs - sampler_log_probs| of a token, in nats",
    "train/correction_mean": "mean factor that corrects the mismatch between policy and sampler",
    "train/masked_fraction": "share of tokens taken out because policy and sampler differ too much on them",
    "train/vetoed_fraction": "share of tokens taken out with their rollout, of which a token is beyond the veto",
    "train/fp8_amax": "largest absolute value that went into FP8: of any tensor (delayed recipe), of a weight (others)",
    "train/fp8_cut_fraction": "share of FP8 tensors with values beyond their scale, cut there; delayed recipe only",
    "train/fp8_zero_fraction": "share of FP8 weights with the code 0: mostly too small beside the largest of a block",
    "train/unreplayed_fraction": "share of tokens whose experts the policy chose itself: the engine's are not known",
    "train/unused_rollouts": "rollouts of the step that are not trained on: overlong ones and those of dropped groups",
    "train/updates": "optimizer steps of the step",
    "train/num_loss_tokens": "tokens trained on, per epoch over the rollouts",
    "critic/loss": "the critic's loss, mean over its updates of the step",
    "critic/clip_fraction": "share of tokens whose value was kept close to the one before the update",
    "critic/grad_norm": "norm of the critic's gradient before clipping, mean over its updates of the step",
    "critic/learning_rate": "learning rate of the critic's last update of the step",
    "critic/value_mean": "mean value of a token, before the updates",
    "critic/return_mean": "mean of what the critic should have said",
    "critic/explained_variance": "1 - variance of the critic's error over that of the returns; 1: it knows all",
    "time/rollout_seconds": "sampling",
    "time/reward_seconds": "what scoring took after the last completion",
    "time/log_probs_seconds": "log-probs of the policy before the update, and of the reference",
    "time/critic_seconds": "values of the critic, and its updates",
    "time/train_seconds": "forward, backward and optimizer",
    "time/sync_seconds": "weights from the policy to the engine, and their proof",
    "time/checkpoint_seconds": "saving",
    "time/evaluation_seconds": "evaluating on held-out prompts",
    "time/step_seconds": "the whole step",
    "throughput/tokens_per_second": "prompt and completion tokens of the step per second of the step",
    "throughput/rollout_tokens_per_second": "completion tokens per second of sampling",
    "throughput/mfu": "share of the device's peak arithmetic that training used",
    "sync/bytes": "bytes that the sync wrote into the engine of rank 0, or that rank 0 sent into servers",
    "sync/received_bytes": "of these, bytes that came from other ranks",
    "sync/verify_seconds": "seconds of the sync that its proof took",
    "sync/gb_per_second": "sync/bytes in gigabytes over the seconds of the sync",
    "sync/probe_error": "largest relative error of a layer that the engine computes from a copy of its weights",
    "eval/accuracy": "pass@1 on the held-out prompts",
    "eval/greedy_accuracy": "accuracy on the held-out prompts when the likeliest token is taken each time",
    "eval/reward_mean": "mean reward on the held-out prompts",
    "eval/length_mean": "mean completion length on the held-out prompts, in tokens",
    "eval/pass_at_*": "chance that one of so many samples is right, on the held-out prompts",
    "eval/majority_at_*": "chance that the most frequent answer of so many samples is right",
    "eval/set/*": "one of these numbers on the prompts of one held-out set, where there are several",
    "data/epoch": "passes over the training prompts so far",
    "data/skipped_prompts": "prompts left out so far, longer than the limit",
    "memory/*": "bytes",
    "gpu/*": "what the device reports",
}
"""Name (or shell pattern) -> one line on its meaning."""

StepMetrics = dict[str, float]


def require_known(metrics: Mapping[str, float]) -> None:
    """Raise for a name that is not in `METRICS`.

    Raises:
        ValueError: names the metric and the nearest known one.
    """
    for name in metrics:
        if name not in METRICS and not any(fnmatchcase(name, pattern) for pattern in METRICS):
            nearest = difflib.get_close_matches(name, METRICS, n=1, cutoff=0.0)[0]
            raise ValueError(f"metric={name} is not in observe.metrics.METRICS; use {nearest}, or describe it there")


class MetricsWriter:
    """Writes the lines of `metrics.jsonl`, the curves and the rollouts of the steps from `first_step` on. Rank 0 only.

    Args:
        tensorboard: Write curves too, and `rollouts_shown` rollouts per step as text.
    """

    def __init__(self, folder: RunFolder, *, first_step: int, tensorboard: bool, rollouts_shown: int) -> None:
        self._folder = folder
        self._next_step = first_step
        self._rollouts_shown = rollouts_shown
        self._tensorboard = TensorBoardWriter(folder.tensorboard, first_step=first_step) if tensorboard else None
        # Unbuffered: a line reaches the file in one call, or a crash leaves a torn one, which `open_run` removes.
        self._file = Path(folder.metrics).open("ab", buffering=0)  # noqa: SIM115 - closed by `close`

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """The line of a step: `step` first, then every metric, a value that is not finite as null.

        Raises:
            ValueError: an unknown name, or a step that is written already.
        """
        if step < self._next_step:
            raise ValueError(f"step={step} of metrics.jsonl is written already; the next is {self._next_step}")
        values = self._checked(metrics)
        self._file.write(f"{to_json({'step': step, **values})}\n".encode())
        self._next_step = step + 1
        if self._tensorboard is not None:
            self._tensorboard.scalars(step, values)

    def write_curves(self, step: int, metrics: Mapping[str, float]) -> None:
        """Points of curves alone, for what has no line: the evaluation before the first step."""
        values = self._checked(metrics)
        if self._tensorboard is not None:
            self._tensorboard.scalars(step, values)

    def write_rollouts(self, step: int, rows: Sequence[RolloutRow]) -> None:
        """The rollouts of a step: all of them as a file, a few as text."""
        write_rollouts(self._folder.rollouts_of(step), rows)
        if self._tensorboard is not None and self._rollouts_shown:
            self._tensorboard.rollouts(step, rows, self._rollouts_shown)

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @staticmethod
    def _checked(metrics: Mapping[str, float]) -> StepMetrics:
        require_known(metrics)
        return {name: float(value) for name, value in metrics.items()}
