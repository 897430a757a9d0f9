"""Megatron's optimizer on the host, on CUDA: master weights are pinned, and the update is that of AdamW in float32."""

from __future__ import annotations

import pytest
import torch

from grpo_mega.policy.host_threads import intra_op_threads
from grpo_mega.policy.megatron_patches.host_optimizer import HybridDeviceOptimizer, install

pytestmark = pytest.mark.gpu(1)


@pytest.mark.parametrize("threads", [1, 4])
def test_three_updates_on_the_host_equal_those_of_adamw(threads: int) -> None:
    install()
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(s, generator=generator).bfloat16().float() for s in ((300, 70), (1001,))]
    weights = [w.bfloat16().cuda() for w in exact]
    settings = {"lr": 1e-2, "weight_decay": 0.1, "fused": True}
    optimizer = HybridDeviceOptimizer(
        [{"params": weights}], offload_fraction=1.0, cpu_optimizer_cls=torch.optim.AdamW,
        gpu_optimizer_cls=torch.optim.AdamW, param_update_in_fp32=True, **settings,
    )  # fmt: skip
    expected = torch.optim.AdamW([{"params": exact, **settings}])
    for _ in range(3):
        for weight, master in zip(weights, exact, strict=True):
            master.grad = torch.randn(master.shape, generator=generator)
            weight.decoupled_grad = master.grad.cuda()  # type: ignore[attr-defined]
        expected.step()
        with intra_op_threads(threads):
            optimizer.step()
    torch.cuda.synchronize()
    masters = list(optimizer.gpu_params_map_cpu_copy.values())
    assert all(master.is_pinned() for master in masters)
    assert all(torch.equal(a, b) for a, b in zip(masters, exact, strict=True))
    assert all(torch.equal(a.cpu(), b.bfloat16()) for a, b in zip(weights, exact, strict=True))
