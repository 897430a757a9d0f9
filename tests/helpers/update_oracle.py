"""Oracle of three updates on recorded rollouts: transformers, autograd and torch's AdamW in float64.

Written from DeepSeekMath, arXiv:2402.03300, section "From PPO to GRPO", with equation 4 as its KL. It computes one
rollout at a time, without packing, padding, masks or weights, and shares no code with the package.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.helpers.recorded_rollouts import CLIP_HIGH, CLIP_LOW, KL_COEF, NUM_UPDATES, OPTIMIZER, TEMPERATURES, Recorded


@dataclass(frozen=True)
class Expected:
    """The expected results of three updates, with the tensor names of the checkpoint.

    Per update: loss, gradient norm and gradients (before clipping), fraction of clipped tokens, mean KL. `tensors`:
    after 0, 1, 2 and 3 updates. Logits [T, V], log-probs and entropies of each rollout: before the first update.
    """

    logits: list[Tensor]
    log_probs: dict[float, list[list[float]]]
    entropy: list[list[float]]
    losses: list[float]
    grad_norms: list[float]
    clip_fractions: list[float]
    kls: list[float]
    tensors: list[dict[str, Tensor]]
    gradients: list[dict[str, Tensor]]


def load_model(folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    )


def perturbed_log_probs(
    recorded_groups: Any, folder: Path, temperature: float, scale: float, seed: int
) -> list[list[float]]:
    """Return the log-probs of each rollout under the model with noise of `scale` added to every weight."""
    model = load_model(folder)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
        return [
            log_probs_and_entropies(model, rollout, temperature)[0].tolist() for rollout in recorded_groups.rollouts
        ]


def compute_expected(recorded: Recorded, dtype: torch.dtype = torch.float64) -> Expected:
    """Compute three updates and return their results."""
    model = load_model(recorded.model, dtype)
    rollouts, temperature = recorded.groups.rollouts, recorded.temperature
    with torch.no_grad():
        logits = [_logits(model, r) for r in rollouts]
        log_probs = {t: [log_probs_and_entropies(model, r, t)[0].tolist() for r in rollouts] for t in TEMPERATURES}
        entropy = [log_probs_and_entropies(model, r, temperature)[1].tolist() for r in rollouts]
    # biases of stacked experts are matrices
    decays = {name: p.dim() > 1 and not name.endswith("bias") for name, p in model.named_parameters()}
    matrices, vectors = ([p for n, p in model.named_parameters() if decays[n] == many] for many in (True, False))
    adam = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": OPTIMIZER.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=OPTIMIZER.lr,
        betas=(OPTIMIZER.beta1, OPTIMIZER.beta2),
        eps=OPTIMIZER.eps,
    )
    expected = Expected(logits, log_probs, entropy, [], [], [], [], [_tensors(model)], [])
    for _ in range(NUM_UPDATES):
        adam.zero_grad()
        loss, clipped, kl = grpo_loss(model, recorded)
        loss.backward()
        expected.gradients.append(by_checkpoint_name(model, {n: p.grad for n, p in model.named_parameters()}))
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_grad)
        adam.step()
        expected.losses.append(float(loss.detach()))
        expected.grad_norms.append(float(norm))
        expected.clip_fractions.append(clipped)
        expected.kls.append(kl)
        expected.tensors.append(_tensors(model))
    return expected


def grpo_loss(model: Any, recorded: Recorded) -> tuple[Tensor, float, float]:
    """Return -J of GRPO, the fraction of clipped tokens and the KL: means over tokens, then over rollouts."""
    size = recorded.groups.group_size
    total, clipped, divergence = torch.zeros((), dtype=torch.float64), 0.0, 0.0
    for i, rollout in enumerate(recorded.groups.rollouts):
        rewards = torch.tensor(recorded.rewards[i // size * size :][:size], dtype=torch.float64)
        advantage = 0.0
        if rewards.std() > 0:
            advantage = float((recorded.rewards[i] - rewards.mean()) / (rewards.std() + 1e-6))
        log_probs, _ = log_probs_and_entropies(model, rollout, recorded.temperature)
        ratio = (log_probs - torch.tensor(recorded.old[i])).exp()
        bounded = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
        objective = torch.minimum(ratio * advantage, bounded * advantage)
        d = torch.tensor(recorded.ref[i]) - log_probs
        kl = d.exp() - d - 1
        total = total - (objective - KL_COEF * kl).mean()
        clipped += float((bounded * advantage < ratio * advantage).double().mean())
        divergence += float(kl.detach().mean())
    count = len(recorded.groups.rollouts)
    return total / count, clipped / count, divergence / count


def log_probs_and_entropies(model: Any, rollout: Any, temperature: float) -> tuple[Tensor, Tensor]:
    """Return log-probs and entropies of the completion tokens that the policy sampled."""
    logits = _logits(model, rollout)[len(rollout.prompt.token_ids) - 1 : -1] / temperature
    every = torch.log_softmax(logits, -1)
    chosen = every.gather(1, torch.from_numpy(rollout.completion.token_ids).long()[:, None])[:, 0]
    mask = rollout.completion.loss_mask
    own = torch.ones(len(chosen), dtype=torch.bool) if mask is None else torch.from_numpy(mask)
    return chosen[own], -(every.exp() * every).sum(-1)[own]


def _logits(model: Any, rollout: Any) -> Tensor:
    """Return the logits [T, V] of prompt and completion."""
    ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.completion.token_ids]])
    found: Tensor = model(input_ids=ids, use_cache=False).logits[0].double()
    return found


def _tensors(model: Any) -> dict[str, Tensor]:
    persistent = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    return by_checkpoint_name(model, dict(model.named_parameters()) | buffers)


def by_checkpoint_name(model: Any, tensors: dict[str, Any]) -> dict[str, Tensor]:
    """Rename tensors as in the checkpoint: transformers stacks experts in memory, its save conversion splits them."""
    from transformers.core_model_loading import revert_weight_conversion

    copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    return dict(revert_weight_conversion(model, copies))
