"""Part `log_probs` of tools/gpu_proof.py: the policy's modules against transformers, on packed rows.

transformers computes one sequence at a time, eagerly, on the same device. The policy computes the same sequences packed
into one row, and the gradient of the sum of their weighted log-probs. Two limits:

fp32   LIMIT_FP32 nats for the largest difference, LIMIT_GRADIENT for the relative difference of the whole gradient
bf16   the policy's mean error must be at most BF16_RATIO times the mean error of transformers in bf16; both errors are
       relative to transformers in fp32 with the same weights. The same holds for the gradient.

Each family has a control: transformers computes the row as one sequence, which is what attention without limits between
sequences would return. Its difference must be far above the limits, or the comparison shows nothing.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_mega.formats.stored_head import checkpoint_spec
from grpo_mega.parallel.ranks import Ranks, init_ranks
from grpo_mega.parallel.topology import Topology
from grpo_mega.policy.policy import MegatronPolicy
from grpo_mega.types import Microbatch
from tools.gpu_checks import subject
from tools.gpu_checks.part_job import PartJob
from tools.gpu_checks.random_models import FAMILIES, VOCAB, family_fields, write_random_model

LIMIT_FP32 = 1e-4
"""Nats. Sums of up to 1,024 fp32 products in another order differ by about 1e-6 of their size in each layer."""
LIMIT_GRADIENT = 1e-4
"""Relative. The rounding errors of the forward and the backward pass add up; TF32 would give about 1e-3."""
BF16_RATIO = 2.0
"""Two programs that round to bf16 in different places have errors of the same size; a wrong result has a larger one."""
CONTROL = 3.0
"""Factor between the control's mean difference and the limit of a mean difference."""
_BUCKET_BYTES = 2**28


@dataclass(frozen=True)
class Scores:
    """Log-probs of all predicted tokens [N] float32, and the gradient of the loss by checkpoint name."""

    log_probs: Tensor
    gradient: dict[str, Tensor]


class WeightedLogProbs:
    """The loss -log_probs * token_weights, as transformers can compute it too."""

    needs_reference = False

    def __call__(self, log_probs: Tensor, entropy: Tensor, microbatch: Microbatch) -> tuple[Tensor, dict[str, Tensor]]:
        """See `TokenLoss`."""
        return -log_probs, {}


def main(job: PartJob) -> None:
    """Compare every family in both precisions."""
    if job.on_gpu:
        torch.backends.cuda.matmul.allow_tf32 = False  # fp32 is compared as fp32
    ranks = init_ranks(Topology(1), 600.0)
    worst, found = 0.0, {}
    for family in FAMILIES:
        with tempfile.TemporaryDirectory(prefix="gpu_proof_") as work:
            folder = Path(work) / "model"
            write_random_model(folder, family_fields(family, tiny=job.size == "tiny"), job.device)
            found[family] = compare_family(job, family, folder, ranks)
        worst = max(worst, found[family]["fp32"]["max_abs"])
        job.result.add(**found)
    job.result.put(main=f"{', '.join(found)}: largest difference in fp32 {worst:.1e} nats")
    dist.destroy_process_group()


def compare_family(job: PartJob, family: str, folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Return the differences of one family, and add its checks."""
    sequences = random_sequences(job.size)
    row = packed_row(sequences)
    reference = transformers_scores(folder, sequences, torch.float32, job.device)
    as_one = transformers_scores(folder, [[t for s in sequences for t in s]], torch.float32, job.device).log_probs
    ends = torch.tensor([len(s) for s in sequences]).cumsum(0)[:-1] - 1  # predictions over an end have no counterpart
    kept = torch.ones(len(as_one), dtype=torch.bool).index_fill_(0, ends, False)
    control = float((as_one[kept] - reference.log_probs).abs().mean())
    found: dict[str, Any] = {"tokens": len(reference.log_probs), "control_mean_abs": control}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        ours, modules = policy_scores(job, folder, name, row, ranks)
        found |= {"modules": modules, name: differences(ours, reference)}
        if name == "bf16":
            theirs = transformers_scores(folder, sequences, dtype, job.device)
            found["transformers_bf16"] = differences(theirs, reference)
    add_checks(job, family, found)
    return found


def add_checks(job: PartJob, family: str, found: dict[str, Any]) -> None:
    """Add the checks of one family."""
    exact, rounded, theirs = found["fp32"], found["bf16"], found["transformers_bf16"]
    limits = (
        ("fp32 log-probs, largest difference", exact["max_abs"], LIMIT_FP32, "order of fp32 sums"),
        ("fp32 gradient, relative difference", exact["gradient"], LIMIT_GRADIENT, "order of fp32 sums"),
        ("bf16 log-probs, mean difference", rounded["mean_abs"], BF16_RATIO * theirs["mean_abs"],
         f"{BF16_RATIO:g} times that of transformers in bf16"),
        ("bf16 gradient, relative difference", rounded["gradient"], BF16_RATIO * theirs["gradient"],
         f"{BF16_RATIO:g} times that of transformers in bf16"),
    )  # fmt: skip
    for name, value, limit, reason in limits:
        job.result.check(f"{family}: {name}", value, limit, passed=value <= limit, reason=reason)
    control, needed = found["control_mean_abs"], CONTROL * max(LIMIT_FP32, BF16_RATIO * theirs["mean_abs"])
    job.result.check(
        f"{family}: control, mean difference without limits between sequences", control, needed,
        passed=control >= needed, reason=f"must be at least {CONTROL:g} times the limits, or they find nothing",
    )  # fmt: skip


def random_sequences(size: str) -> list[list[int]]:
    """Return sequences of random tokens with different lengths; none is a multiple of a kernel's block."""
    rng = random.Random(3)
    lengths = (301, 17, 130, 2, 449, 65) if size != "tiny" else (61, 2, 33, 120)
    return [[rng.randrange(2, VOCAB) for _ in range(length)] for length in lengths]


def packed_row(sequences: Sequence[Sequence[int]]) -> Microbatch:
    """Return one row of all sequences; the last token of each predicts nothing and has weight 0."""
    lengths = torch.tensor([len(s) for s in sequences])
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int()
    ids = torch.tensor([token for sequence in sequences for token in sequence])
    mask = torch.ones(len(ids), dtype=torch.bool).index_fill_(0, cu_seqlens[1:].long() - 1, False)
    weights = torch.zeros(len(ids))
    weights[mask] = token_weights(int(mask.sum()))
    return Microbatch(
        rollout_ids=tuple(range(len(sequences))), token_ids=ids,
        position_ids=torch.cat([torch.arange(n) for n in lengths.tolist()]), labels=ids.roll(-1), loss_mask=mask,
        cu_seqlens=cu_seqlens, advantages=torch.ones(len(ids)), token_weights=weights,
        sampler_log_probs=torch.zeros(len(ids)),
    )  # fmt: skip


def token_weights(count: int) -> Tensor:
    """Return different factors for the losses of the tokens, [count] float32."""
    return torch.linspace(0.5, 1.5, count) / count


def policy_scores(job: PartJob, folder: Path, dtype: str, row: Microbatch, ranks: Ranks) -> tuple[Scores, str]:
    """Return the policy's log-probs and gradient, and the kind of its modules."""
    spec = checkpoint_spec(folder)
    config = subject.config_of(job.size, folder, f"precision.dtype={dtype}")
    policy = MegatronPolicy(config, spec, folder, ranks, with_reference=False)
    log_probs = policy.log_probs([row])
    assert log_probs is not None, "one rank has every stage"
    policy.backward([row], WeightedLogProbs())
    gradient = {name: tensor.float().cpu().clone() for name, tensor in policy.full_gradients(_BUCKET_BYTES)}
    return Scores(log_probs[0].float().cpu()[row.loss_mask], gradient), policy.parts.config.transformer_impl


def transformers_scores(
    folder: Path, sequences: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device
) -> Scores:
    """Return log-probs and gradient of transformers, one sequence at a time."""
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    ).to(device).eval()  # fmt: skip
    found = []
    for tokens in sequences:
        ids = torch.tensor([list(tokens)], device=device)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        found.append(torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None])[:, 0])
    log_probs = torch.cat(found)
    (-log_probs * token_weights(len(log_probs)).to(device)).sum().backward()
    gradients = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}
    # stacked experts are separate tensors in a checkpoint
    named = revert_weight_conversion(model, gradients)
    return Scores(log_probs.detach().cpu(), {name: tensor.float().cpu() for name, tensor in named.items()})


def differences(found: Scores, expected: Scores) -> dict[str, Any]:
    """Return the differences of log-probs, and of the gradient over all tensors: |a - b| / |b| as one vector.

    Raises:
        AssertionError: a tensor has a gradient on one side only.
    """
    missing = found.gradient.keys() ^ expected.gradient.keys()
    # an expert that no token chose has no gradient in transformers, and a gradient of 0 here
    missing = {name for name in missing if bool(found.gradient.get(name, torch.ones(1)).any())}
    assert not missing, f"gradient of one side only: {sorted(missing)[:5]}"
    names = found.gradient.keys() & expected.gradient.keys()
    error = sum(float((found.gradient[n] - expected.gradient[n]).double().square().sum()) for n in names)
    norm = sum(float(expected.gradient[n].double().square().sum()) for n in names)
    difference = (found.log_probs - expected.log_probs).abs()
    return {
        "max_abs": float(difference.max()), "mean_abs": float(difference.mean()), "gradient": (error / norm) ** 0.5,
        "gradient_tensors": len(names),
    }  # fmt: skip
