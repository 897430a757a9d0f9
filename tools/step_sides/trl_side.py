"""TRL's side of tools/bench_step.py: GRPOTrainer.train(), which waits for a command before each optimizer step.

Runs in its own environment, in which grpo_mega is not installed.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from datasets import load_dataset
from protocol import Channel, Stopwatch
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer


def short(completions: list[str], **_: Any) -> list[float]:
    """Return 1 / (1 + length): short completions have a high reward."""
    return [1 / (1 + len(completion)) for completion in completions]


def grpo_config(settings: dict[str, Any]) -> GRPOConfig:
    """Return a config with one generation batch and one update; all else that affects speed has TRL's defaults."""
    num_rollouts = settings["num_prompts"] * settings["group_size"]
    return GRPOConfig(
        output_dir=settings["run_dir"],
        use_cpu=True,
        bf16=False,
        beta=0.0,
        loss_type="grpo",
        num_generations=settings["group_size"],
        per_device_train_batch_size=settings["trl_microbatch"],
        gradient_accumulation_steps=num_rollouts // settings["trl_microbatch"],
        gradient_checkpointing=False,  # TRL's default recomputes the forward pass; memory is sufficient here
        max_completion_length=settings["max_tokens"],
        temperature=1.0,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        max_steps=10**6,
        shuffle_dataset=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        model_init_kwargs={"dtype": "float32"},
    )


class Clock:
    """Timer around methods of the trainer. With `given`, generation returns these completions."""

    def __init__(self, trainer: GRPOTrainer) -> None:
        self.given: list[list[int]] = []
        self.phases: dict[str, float] = {}
        self.completions: list[list[int]] = []
        self._generate, self._score = trainer._generate_single_turn, trainer._calculate_rewards
        trainer._generate_single_turn = self.generate
        trainer._calculate_rewards = self.score

    def generate(self, *args: Any, **kwargs: Any) -> tuple[list[list[int]], None]:
        """Replacement of `_generate_single_turn`."""
        started = time.perf_counter()
        if self.given:
            self.completions = [list(ids) for ids in self.given]
        else:
            self.completions, _ = self._generate(*args, **kwargs)
        self.phases["rollout"] = time.perf_counter() - started
        return self.completions, None

    def score(self, *args: Any, **kwargs: Any) -> Any:
        """Replacement of `_calculate_rewards`."""
        started = time.perf_counter()
        rewards = self._score(*args, **kwargs)
        self.phases["reward"] = time.perf_counter() - started
        return rewards


class OnCommand(TrainerCallback):
    """Callback that waits for a command before each optimizer step and answers after it."""

    def __init__(self, channel: Channel) -> None:
        self.channel, self.watch = channel, Stopwatch()
        self.clock: Clock | None = None

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Wait for a command; called before the first microbatch and therefore before the generation."""
        command = self.channel.receive()
        if command is None:
            sys.exit(0)
        assert self.clock is not None
        self.clock.given, self.clock.phases = command["completions"] or [], {}
        self.watch = Stopwatch()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Answer; called after the optimizer step."""
        assert self.clock is not None
        taken = self.watch.read()
        phases = {**self.clock.phases, "train": taken["seconds"] - sum(self.clock.phases.values())}
        self.channel.send({**taken, "phases": phases, "completions": self.clock.completions})


def main() -> None:
    """Execute commands until the parent closes the stream."""
    channel, settings = Channel(), json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    callback = OnCommand(channel)
    trainer = GRPOTrainer(
        model=settings["model"],
        reward_funcs=short,
        args=grpo_config(settings),
        train_dataset=load_dataset("json", data_files=settings["prompts"], split="train"),
        callbacks=[callback],
    )
    callback.clock = Clock(trainer)
    channel.send({"threads": torch.get_num_threads()})
    trainer.train()


if __name__ == "__main__":
    main()
