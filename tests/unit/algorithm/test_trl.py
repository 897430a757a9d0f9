"""Our loss equals that of TRL's GRPOTrainer on the same log-probs and rewards; runs where TRL is installed.

TRL's trainer is not built: its loss is called with the few attributes that it reads, so that no model is needed.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_mega.config.algorithm_section import AlgorithmConfig
from tests.helpers.algorithm_oracle import (
    LENGTHS,
    MAX_TOKENS,
    REWARDS,
    RolloutValues,
    compute_update_loss,
    gradient_of,
    make_data,
)

trl = pytest.importorskip("trl", reason="TRL is not installed; tools/bench_step.py makes an environment with it")

# what TRL needs to compute the same: loss_type, importance_sampling_level, scale_rewards, and our keys
CASES: dict[str, tuple[str, str, bool, dict[str, Any]]] = {
    "grpo": ("grpo", "token", True, {}),
    "dr_grpo": ("dr_grpo", "token", False, {}),
    "dapo": ("dapo", "token", True, {"overlong_buffer_fraction": None, "degenerate": "keep"}),
    "gspo": ("grpo", "sequence", True, {}),
    "cispo": ("cispo", "token", True, {"aggregation": "token_mean"}),
    "sapo": ("sapo", "token", True, {}),
}


def pad_rows(values: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(values, batch_first=True)


def trl_loss(data: RolloutValues, algorithm: AlgorithmConfig, loss_type: str, level: str, scale: bool) -> Tensor:
    rewards = torch.tensor(REWARDS, dtype=torch.float64)
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if scale:
        advantages = advantages / (rewards.std(dim=1, keepdim=True) + 1e-6)  # our eps: TRL adds 1e-4
    log_probs = pad_rows(data.log_probs)
    mask = pad_rows([torch.ones(n) for n in LENGTHS])
    high = algorithm.clip_high or 0.0
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (log_probs, torch.zeros_like(log_probs), None),
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1),
        args=SimpleNamespace(
            use_bias_correction_kl=False,
            delta=None,
            steps_per_generation=1,
            sapo_temperature_pos=algorithm.gate_positive,
            sapo_temperature_neg=algorithm.gate_negative,
        ),
        beta=algorithm.kl_coef,
        epsilon_low=algorithm.clip_low,
        epsilon_high=1 + high if loss_type == "cispo" else high,  # TRL's is the bound itself there
        loss_type=loss_type,
        importance_sampling_level=level,
        max_completion_length=MAX_TOKENS,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
    )
    ids = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.int64)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1],
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": advantages.flatten(),
        "old_per_token_logps": pad_rows(data.old),
        "ref_per_token_logps": pad_rows(data.ref),
        "num_items_in_batch": mask.sum(),
    }
    loss: Tensor = trl.GRPOTrainer._compute_loss(trainer, None, inputs)
    return loss


@pytest.mark.parametrize("spread", [0.4, 6e-4])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_equal_those_of_trl(name: str, spread: float) -> None:
    loss_type, level, scale, keys = CASES[name]
    algorithm = AlgorithmConfig(name=name, **keys)
    data = make_data(spread)
    expected = trl_loss(data, algorithm, loss_type, level, scale)
    found, _ = compute_update_loss(data, algorithm)
    assert expected.abs() > 1e-6
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient_of(found, data), gradient_of(expected, data), rtol=1e-5, atol=1e-6)
