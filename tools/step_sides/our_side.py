"""Our side of tools/bench_step.py: the training job, which makes one step of its loop per command.

A step includes everything that a run does: metrics, TensorBoard, the file of rollouts, and the digest of every synced
tensor. Only the checkpoint is left out.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matrix_products import cpu_seconds, forward_products
from no_saves import NoSaves
from protocol import Channel, Stopwatch

from grpo_mega.config.schema import Config
from grpo_mega.rewards.base import reward

if TYPE_CHECKING:
    from grpo_mega.checkpoint.manager import LoopState
    from grpo_mega.rollout.sampled_groups import SampledGroups
    from grpo_mega.trainer.build import BuiltJob
    from grpo_mega.trainer.loop import TrainerState
    from grpo_mega.types import Prompt

MAX_STEPS = 10**6


@reward(low=0.0, high=1.0)
def short(prompt: str, completion: str, reference: str) -> float:
    """Return 1 / (1 + length): short completions have a high reward."""
    return 1 / (1 + len(completion))


def config_of(settings: dict[str, Any]) -> Config:
    """Return a config with one update per step, no KL, and the reward above."""
    return Config.model_validate(
        {
            "run": {"dir": settings["run_dir"]},
            "model": {"path": settings["model"]},
            "engine": {"max_num_seqs": settings["num_prompts"] * settings["group_size"]},
            "sampling": {"group_size": settings["group_size"], "max_tokens": settings["max_tokens"]},
            "data": {
                "train": settings["prompts"],
                "prompts_per_step": settings["num_prompts"],
                "template": "plain",
                "max_prompt_tokens": settings["max_prompt_tokens"],
            },
            "reward": {"terms": [{"name": "our_side:short"}]},
            "algorithm": {"kl_coef": 0.0},
            "train": {"steps": MAX_STEPS, "max_tokens_per_microbatch": settings["max_tokens_per_microbatch"]},
            "precision": {"dtype": "fp32"},
        }
    )


class OurSide:
    """A built job and its present state."""

    def __init__(self, built: BuiltJob, prompts: Sequence[Prompt]) -> None:
        from grpo_mega.formats.stored_head import checkpoint_spec
        from grpo_mega.trainer.loop import push_weights

        self.job: TrainerState = built.job
        self.prompts = prompts
        self.spec = checkpoint_spec(built.model_folder)
        self.state: LoopState = built.state
        self.writer = built.writer
        self.folder = built.run_state.folder.path
        first = push_weights(self.job, self.state)
        self.job.observer.started(first.policy_digest, None)

    def whole(self) -> dict[str, Any]:
        """Make one step of loop.train."""
        from grpo_mega.trainer.loop import train

        steps = self.state.step + 1
        config = self.job.config.model_copy(update={"train": self.job.config.train.model_copy(update={"steps": steps})})
        job: Any = replace(self.job, config=config, saves=NoSaves())
        clock = Stopwatch()
        self.state = train(job, self.state)
        self.writer.flush()
        taken = clock.read()
        phases = self.job.timers.step_seconds()
        step_seconds = phases.pop("step")
        phases["other"] = step_seconds - sum(phases.values())
        return {**taken, "phases": phases, "completions": self._completions(steps)}

    def train_only(self, completions: list[list[int]]) -> dict[str, Any]:
        """Compute advantages, pack and update on given completions; the weight sync after it is not timed.

        `matrix_products_cpu` are the CPU seconds of the matrix products of the same rows, made alone after the update.
        """
        from grpo_mega.checkpoint.manager import LoopState
        from grpo_mega.trainer.learning import make_batch, update, with_log_probs
        from grpo_mega.trainer.loop import push_weights

        groups = self._groups(completions)
        clock = Stopwatch()
        with self.job.phases.training():
            objective = self.job.objective
            batch = make_batch(self.job, objective, groups, self.state.step)
            batch = with_log_probs(self.job, objective, batch)
            _, updates = update(self.job, objective.loss(), batch, self.state.policy_version)
        taken = clock.read()
        self.state = LoopState(self.state.step, self.state.policy_version + len(updates))
        push_weights(self.job, self.state)
        segments = [microbatch.cu_seqlens.diff().tolist() for microbatch in batch.microbatches]
        products = cpu_seconds(forward_products(self.spec, segments))
        phases = {"train": taken["seconds"], "matrix_products_cpu": products}
        return {**taken, "phases": phases, "completions": completions}

    def _completions(self, step: int) -> list[list[int]]:
        """Return the completions of the step from its files, in the order of the dataset's prompts."""
        from grpo_mega.observe.rollout_files.reader import read_rows
        from grpo_mega.observe.run_folder import RunFolder

        order = {prompt.text: prompt.index for prompt in self.prompts}
        rows = sorted(read_rows(RunFolder(self.folder).rollouts_of(step)), key=lambda row: order[row["prompt"]])
        return [row["completion_ids"] for row in rows]

    def _groups(self, completions: list[list[int]]) -> SampledGroups:
        from grpo_mega.rollout.sampled_groups import SampledGroups
        from grpo_mega.types import Completion, Reward, Rollout

        size = self.job.config.sampling.group_size
        rollouts = [
            Rollout(
                prompt=self.prompts[i // size],
                completion=Completion(tuple(ids), (0.0,) * len(ids), "eos", self.state.policy_version, ""),
                reward=Reward(1 / (1 + len(ids))),
                replica=0,
            )
            for i, ids in enumerate(completions)
        ]
        return SampledGroups.of(rollouts, size)


@contextmanager
def built_job(settings: dict[str, Any], config: Config) -> Iterator[tuple[BuiltJob, Sequence[Prompt]]]:
    """Build the job of this process, and yield it with its prompts."""
    import torch

    from grpo_mega.config.load import resolved
    from grpo_mega.observe.run_folder import open_run
    from grpo_mega.parallel.ranks import init_ranks
    from grpo_mega.parallel.stop_signal import StopRequests
    from grpo_mega.train import prepare
    from grpo_mega.trainer.build import building

    torch.set_num_threads(settings["threads"])
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=settings["port"])
    prepared = prepare(config)
    ranks = init_ranks(prepared.topology, config.guard.timeout_seconds)
    run = open_run(Path(settings["run_dir"]), resolved(config), overwrite=False, train_steps=MAX_STEPS)
    with building(config, ranks, run, Path(settings["model"]), prepared.train_prompts, None, StopRequests()) as built:
        yield built, prepared.train_prompts.prompts


def main() -> None:
    """Execute commands until the parent closes the stream."""
    channel, settings = Channel(), json.loads(sys.argv[1])
    import torch

    with built_job(settings, config_of(settings)) as (built, prompts):
        side = OurSide(built, prompts)
        channel.send({"threads": torch.get_num_threads()})
        while (command := channel.receive()) is not None:
            channel.send(side.train_only(command["completions"]) if command["completions"] else side.whole())


if __name__ == "__main__":
    main()
