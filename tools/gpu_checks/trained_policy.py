"""A small policy and its batch, for the parts of tools/gpu_proof.py that compare its state before and after."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_mega.config.schema import Config
from grpo_mega.formats.stored_head import checkpoint_spec
from grpo_mega.interfaces import LearnerState, TokenLoss
from grpo_mega.models.digest import slice_digest, wrap_int64
from grpo_mega.models.spec import ModelSpec
from grpo_mega.parallel.ranks import Ranks, init_ranks
from grpo_mega.parallel.topology import Topology
from grpo_mega.policy.phase_offload import optimizer_tensors
from grpo_mega.policy.policy import MegatronPolicy
from grpo_mega.trainer.batch import TrainBatch
from grpo_mega.types import Microbatch, TensorSlice
from tools.gpu_checks import subject
from tools.gpu_checks.part_job import PartJob

ALL: tuple[LearnerState, ...] = ("params", "grads", "optimizer")
LEARNING_RATE = 1e-3  # large, so that an update changes log-probs visibly
_COLUMNS = 1024


@dataclass(frozen=True)
class PolicySetup:
    """Arguments that build a policy, once or several times, and the batch that it trains on."""

    config: Config
    spec: ModelSpec
    folder: Path
    ranks: Ranks
    batch: TrainBatch
    loss: TokenLoss

    def build(self, *, with_reference: bool = False) -> MegatronPolicy:
        """Build a policy with the weights of the folder."""
        return MegatronPolicy(self.config, self.spec, self.folder, self.ranks, with_reference=with_reference)

    def rows(self, old: list[Tensor]) -> tuple[Microbatch, ...]:
        """Return the microbatches with the log-probs of the policy before the update."""
        return tuple(self.batch.with_log_probs(old=[row.cpu() for row in old], ref=None).microbatches)

    def log_probs(self, policy: MegatronPolicy) -> list[Tensor]:
        """Return the policy's log-probs of the batch."""
        found = policy.log_probs(self.batch.microbatches)
        assert found is not None, "one rank has every stage"
        return found

    def update(self, policy: MegatronPolicy) -> None:
        """Run one optimizer step on the batch."""
        policy.update(self.rows(self.log_probs(policy)), self.loss, LEARNING_RATE)


@contextmanager
def policy_setup(job: PartJob) -> Iterator[PolicySetup]:
    """Yield the setup of a small model in bf16, in a job of one rank."""
    size = "tiny" if job.size == "tiny" else "small"
    with tempfile.TemporaryDirectory(prefix="gpu_proof_") as work:
        folder = Path(work) / "model"
        job.result.add(parameters=subject.make_subject(size, folder, job.device))
        config, spec = subject.config_of(size, folder), checkpoint_spec(folder)
        batch, objective = subject.batch_of(subject.random_groups(size, spec.vocab_size), config)
        yield PolicySetup(config, spec, folder, init_ranks(Topology(1), 600.0), batch, objective.loss())
        dist.destroy_process_group()


def state_digests(policy: MegatronPolicy) -> dict[str, int]:
    """Return a digest of all weights, and one of the optimizer's master weights and moments."""
    weights = sum(slice_digest(held.view, held.hf) for held in policy.source.shards())
    optimizer = sum(
        (number + 1) * flat_digest(tensor) for number, tensor in enumerate(optimizer_tensors(policy.parts.optimizer))
    )
    return {"weights": wrap_int64(weights), "optimizer": wrap_int64(optimizer)}


def flat_digest(tensor: Tensor) -> int:
    """Return the digest of a tensor of any shape, as a matrix of _COLUMNS columns and a rest."""
    flat = tensor.detach().flatten()
    whole = len(flat) // _COLUMNS * _COLUMNS
    matrix, rest = flat[:whole].view(-1, _COLUMNS), flat[whole:].view(1, -1)
    found = 0
    for first_row, part in ((0, matrix), (len(matrix), rest)):
        found += slice_digest(part, TensorSlice("state", (first_row, 0), tuple(part.shape)))
    return found


def equal_bits(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Return whether all tensors are equal bit for bit."""
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(found, expected, strict=True))


def check_equal(job: PartJob, name: str, found: object, expected: object, reason: str) -> None:
    """Add a check that two values are equal."""
    job.result.check(name, found, expected, passed=found == expected, reason=reason)


def check_changed(job: PartJob, name: str, found: object, before: object) -> None:
    """Add a check that a value changed; without it, a comparison with an unchanged value would show nothing."""
    job.result.check(name, found, f"other than {before}", passed=found != before, reason="the update must be visible")
