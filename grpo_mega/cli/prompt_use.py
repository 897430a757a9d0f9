"""Counts the prompts of a complete run that carries rollouts: each must be trained once, or be carried at its end.

Asserted by tests/unit/cli/test_prompt_use.py and tests/e2e/test_asynchrony.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PromptUse:
    """Numbers of prompts in the order of the run's data set.

    Attributes:
        begun: prompts that a shard has begun.
        trained: prompts of the trained groups, one entry per group.
        carried: prompts of the last checkpoint's open groups, unused groups, and groups that are sampled again.
    """

    begun: Sequence[int]
    trained: Sequence[int]
    carried: Sequence[int]

    def problems(self) -> list[str]:
        """Return a sentence for prompts that are lost, and one for prompts that are used more than once."""
        used = Counter([*self.trained, *self.carried])
        lost = sorted(set(self.begun) - used.keys())
        twice = sorted(prompt for prompt, count in used.items() if count > 1)
        unknown = sorted(used.keys() - set(self.begun))
        found = []
        for name, prompts in (("lost", lost), ("used more than once", twice), ("never begun, but used", unknown)):
            if prompts:
                found.append(f"{len(prompts)} prompts were {name}, the first is {prompts[0]}")
        return found


def read_prompt_use(run: Path) -> PromptUse:
    """Read which prompts a run has used. Each prompt must occur once in its data so far: less than an epoch.

    Args:
        run: folder of a complete run whose rollout files hold all groups, and whose last step has a checkpoint.

    Raises:
        UserError: a file is missing or damaged.
    """
    from grpo_mega.checkpoint.carried_parts import CARRIED
    from grpo_mega.config.load import load_config
    from grpo_mega.data.chat import load_tokenizer
    from grpo_mega.data.dataset import load_train
    from grpo_mega.observe.rollout_files.reader import read_step
    from grpo_mega.observe.run_folder import RunFolder
    from grpo_mega.rollout.carried_rollouts import CarriedRollouts
    from grpo_mega.rollout.partial_sampler import numbered_prompts
    from grpo_mega.tiny_base.train import base_tokenizer

    folder = RunFolder(run)
    config = load_config(folder.config, [])
    base, per_step, steps = config.model.base, config.data.prompts_per_step, config.train.steps
    tokenizer = load_tokenizer(config.model.folder) if base is None else base_tokenizer(base)
    prompt_of = numbered_prompts(load_train(config.data, tokenizer), per_step, config.run.seed)
    begun, carried = list[int](), list[int]()
    for path in sorted((folder.checkpoint_of(steps) / CARRIED).iterdir()):
        part = CarriedRollouts.from_bytes(path.read_bytes(), prompt_of)
        begun += [part.shard.number(place) for place in range(part.taken)]
        carried += [group.number for group in part.groups] + [number for number, _ in part.waiting]
    number_of = {prompt_of(number).index: number for number in begun}
    trained = list[int]()
    for step in range(1, steps + 1):
        table = read_step(folder.rollouts_of(step), ["prompt_index", "member"]).table
        indices = zip(table["prompt_index"].to_pylist(), table["member"].to_pylist(), strict=True)
        trained += [number_of.get(index, -1 - index) for index, member in indices if member == 0]
    return PromptUse(begun, trained, carried)
