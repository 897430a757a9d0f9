"""Losses and gradients of one packed row for families of models, on the CPU or on the CUDA lookalike.

    python -m tests.helpers.policy_pass OUT DEVICE FOLDER FAMILY...

Writes to OUT: name of a case -> family -> {"loss", "gradients": name -> tensor, "log": lines of the attention module}.
Weights, tokens and sequences are the same on both devices. With context parallelism the process is one rank of a fake
process group, whose messages have no content: only devices are checked then. FOLDER keeps the compiled part of the
lookalike.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LENGTHS = (12, 4, 8, 24)


@dataclass(frozen=True)
class Case:
    """A dtype and a layout. `flash` uses the flash kernel for every dtype."""

    dtype: str = "fp32"
    cp: int = 1
    rank: int = 0
    flash: bool = False


CASES = {
    "batches": Case(),
    "flash": Case(flash=True),
    "bf16": Case(dtype="bf16"),
    "batches, context parallel": Case(cp=2),
    "flash, context parallel": Case(dtype="bf16", cp=2, rank=1),
}


def run(family: str, device_name: str, case: Case) -> dict[str, Any]:
    """Compute a forward and a backward pass of a family."""
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from grpo_mega.config.policy_sections import ParallelConfig, PrecisionConfig
    from grpo_mega.models.config_readers import spec_from_config
    from grpo_mega.parallel.context_parallel import rank_index
    from grpo_mega.parallel.ranks import Ranks
    from grpo_mega.parallel.topology import Topology
    from grpo_mega.policy.build import init_groups
    from grpo_mega.policy.module_choice import ModuleChoice
    from grpo_mega.policy.modules.routing_replay import RowParams
    from grpo_mega.policy.transformer_config import build_models, transformer_config
    from tests.helpers.family_configs import raw_family_config

    dtype, cp, rank = case.dtype, case.cp, case.rank
    device = torch.device(device_name, 0) if device_name == "cuda" else torch.device("cpu")
    spec = spec_from_config(raw_family_config(family), "config.json")
    topology = Topology(cp, cp=cp)
    ranks = Ranks(topology, topology.coordinates(rank), device)
    parallel, precision = ParallelConfig(cp=cp), PrecisionConfig(dtype=dtype)
    dist.init_process_group("fake", rank=rank, world_size=cp, store=FakeStore())
    init_groups(ranks, 60.0)
    if device_name == "cuda":
        from megatron.core.tensor_parallel import random

        random._set_cuda_rng_state = lambda *_, **__: None  # random.py:135 sets it through torch._C
    config = transformer_config(spec, parallel, precision, ModuleChoice(False, device.type))
    (model,) = build_models(spec, config, parallel, ranks)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            values = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_((values + (parameter.dim() == 1)).to(parameter.dtype))
    total = sum(LENGTHS)
    tokens = torch.randint(spec.vocab_size, (total,), generator=generator).to(device)
    labels = torch.randint(spec.vocab_size, (total,), generator=generator).to(device)
    bounds = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32, device=device)
    positions = torch.cat([torch.arange(n) for n in LENGTHS]).to(device)
    if cp > 1:
        mine = rank_index(bounds, cp, rank, total)
        tokens, labels, positions = tokens[mine], labels[mine], positions[mine]
    row = RowParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, cu_seqlens_q_padded=bounds,
        cu_seqlens_kv_padded=bounds, max_seqlen_q=max(LENGTHS), max_seqlen_kv=max(LENGTHS),
    )  # fmt: skip
    hidden = model(tokens[None], positions[None], None, packed_seq_params=row)
    log_probs, entropy = model.head_log_probs(hidden, labels, temperature=0.7, vocab_size=spec.vocab_size)
    assert log_probs.device == entropy.device == device
    loss = -(log_probs + 0.1 * entropy).mean()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert all(g is None or g.device == device for g in gradients.values())
    dist.destroy_process_group()
    return {"loss": float(loss), "gradients": {n: g.cpu().float() for n, g in gradients.items() if g is not None}}


def main(out: Path, device: str, folder: Path, families: list[str]) -> None:
    """Compute all families, on the CPU in the first case only."""
    from tests.helpers.cuda_lookalike import cuda_lookalike, load

    if device == "cuda":
        load(folder)
    import torch

    if device == "cuda":
        from grpo_mega.policy.megatron_patches import cpu

        sys.modules[cpu._PAGED_STASH] = cpu._without_triton()  # torch for CUDA comes with triton
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("grpo_mega.policy.modules.packed_attention")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    found: dict[str, dict[str, Any]] = {}
    with cuda_lookalike() if device == "cuda" else contextlib.nullcontext():
        from grpo_mega.policy.modules import packed_attention

        rule = packed_attention.can_use_flash
        for name, case in CASES.items() if device == "cuda" else [("batches", Case())]:
            packed_attention.can_use_flash = (lambda *_: True) if case.flash else rule
            found[name] = {}
            for family in families:
                lines.clear()
                found[name][family] = run(family, device, case) | {"log": list(lines)}
    torch.save(found, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
