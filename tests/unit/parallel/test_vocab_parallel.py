"""Log-probs and entropy from hidden states, compared with log_softmax in float64, on one rank and on gloo ranks."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from grpo_mega.parallel import vocab_parallel
from grpo_mega.parallel.vocab_parallel import vocab_parallel_log_probs

T, H, V, PADDED = 13, 8, 37, 48


def make_problem(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return hidden states, a head with huge values in its padding, labels at both ends of it, upstream gradients."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(PADDED, H, generator=generator)
    weight[V:] = 1e4
    labels = torch.randint(0, V, (T,), generator=generator)
    labels[0], labels[1] = 0, V - 1
    return {
        "hidden": torch.randn(T, H, generator=generator).to(dtype),
        "weight": weight.to(dtype),
        "labels": labels,
        "grad_log_probs": torch.randn(T, generator=generator),
        "grad_entropy": torch.randn(T, generator=generator),
    }


def compute_oracle(given: dict[str, Tensor], temperature: float, uses: tuple[str, ...]) -> dict[str, Tensor]:
    """Compute values and gradients by autograd over all logits in float64."""
    hidden = given["hidden"].double().requires_grad_()
    weight = given["weight"].double().requires_grad_()
    log_p = torch.log_softmax(hidden @ weight[:V].t() / temperature, dim=-1)
    log_probs = log_p.gather(1, given["labels"].unsqueeze(1)).squeeze(1)
    entropy = -(log_p.exp() * log_p).sum(dim=1)
    return gradients_of(hidden, weight, log_probs, entropy, given, uses)


def compute_in_slices(
    given: dict[str, Tensor], temperature: float, uses: tuple[str, ...], slice_tokens: int | None = None
) -> dict[str, Tensor]:
    hidden = given["hidden"].clone().requires_grad_()
    weight = given["weight"].clone().requires_grad_()
    log_probs, entropy = vocab_parallel_log_probs(
        hidden,
        weight,
        given["labels"],
        temperature=temperature,
        vocab_size=V,
        group=None,
        slice_tokens=slice_tokens,
    )
    return gradients_of(hidden, weight, log_probs, entropy, given, uses)


def gradients_of(
    hidden: Tensor, weight: Tensor, log_probs: Tensor, entropy: Tensor, given: dict[str, Tensor], uses: tuple[str, ...]
) -> dict[str, Tensor]:
    """Compute the results, and the gradients of those in `uses`, weighted with the upstream gradients."""
    results = {"log_probs": log_probs, "entropy": entropy}
    loss = torch.stack([(results[name] * given[f"grad_{name}"]).sum() for name in uses]).sum()
    grad_hidden, grad_weight = torch.autograd.grad(loss, (hidden, weight))
    return {**{k: v.detach() for k, v in results.items()}, "grad_hidden": grad_hidden, "grad_weight": grad_weight}


def assert_close(measured: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Assert that each tensor differs by at most `tolerance` times the largest absolute value expected."""
    assert measured.keys() == expected.keys()
    for name, value in expected.items():
        error = (measured[name].double() - value.double()).abs().max().item()
        assert error <= tolerance * value.abs().max().item(), (name, error)


USES = [("log_probs",), ("entropy",), ("log_probs", "entropy")]


@pytest.mark.parametrize("uses", USES, ids="+".join)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_equal_float64_log_softmax(temperature: float, uses: tuple[str, ...]) -> None:
    given = make_problem()
    assert_close(compute_in_slices(given, temperature, uses), compute_oracle(given, temperature, uses), tolerance=1e-6)


@pytest.mark.parametrize("slice_tokens", [1, 3, T])
def test_slices_of_any_size_give_the_same(slice_tokens: int) -> None:
    given = make_problem()
    whole, sliced = compute_in_slices(given, 0.7, USES[2]), compute_in_slices(given, 0.7, USES[2], slice_tokens)
    assert_close(sliced, whole, tolerance=5e-7)


def test_the_logits_of_only_one_slice_are_materialized(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    logits = vocab_parallel._Shard.logits

    def watched(shard: Any, hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
        taken.append(out.numel())
        return logits(shard, hidden, weight, out)

    monkeypatch.setattr(vocab_parallel._Shard, "logits", watched)
    monkeypatch.setattr(vocab_parallel, "SLICE_BYTES", 2 * 4 * PADDED * 4)  # four tokens, in two float32 buffers
    given = make_problem()
    results = compute_in_slices(given, 1.0, USES[2])
    assert taken == [4 * V] * 8  # ceil(13 / 4) slices, forward and backward
    monkeypatch.undo()
    assert_close(results, compute_in_slices(given, 1.0, USES[2]), tolerance=5e-7)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_padding_rows_are_inert(value: float) -> None:
    clean, poisoned = make_problem(), make_problem()
    clean["weight"][V:] = 0
    poisoned["weight"][V:] = value
    expected, measured = compute_in_slices(clean, 1.0, USES[2]), compute_in_slices(poisoned, 1.0, USES[2])
    assert all(torch.equal(measured[name], expected[name]) for name in expected)
    assert (measured["grad_weight"][V:] == 0).all()


def test_large_logits_do_not_overflow() -> None:
    given = make_problem()
    given["hidden"] = given["hidden"] * 1e4
    measured, expected = compute_in_slices(given, 1.0, USES[0]), compute_oracle(given, 1.0, USES[0])
    assert_close(measured, expected, tolerance=1e-6)


def test_bfloat16_takes_and_returns_bfloat16_gradients() -> None:
    given = make_problem(torch.bfloat16)
    measured = compute_in_slices(given, 1.0, USES[0], slice_tokens=5)
    assert measured["log_probs"].dtype == measured["entropy"].dtype == torch.float32
    assert measured["grad_hidden"].dtype == measured["grad_weight"].dtype == torch.bfloat16
    # the logits are a bfloat16 product
    assert_close(measured, compute_oracle(given, 1.0, USES[0]), tolerance=2e-2)


def test_bfloat16_gradient_of_many_slices_is_summed_in_float32() -> None:
    # 600 equal tokens: a bfloat16 sum stops growing at 256 times the first term
    hidden = torch.full((600, 1), 0.5, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    log_probs, _ = vocab_parallel_log_probs(
        hidden,
        weight,
        torch.zeros(600, dtype=torch.int64),
        temperature=1.0,
        vocab_size=2,
        group=None,
        slice_tokens=1,
    )
    (gradient,) = torch.autograd.grad(log_probs.sum(), weight)
    assert gradient.flatten().tolist() == pytest.approx([150, -150], rel=4e-3)


def test_without_grad_mode_nothing_is_kept() -> None:
    given = make_problem()
    hidden, weight = given["hidden"].requires_grad_(), given["weight"].requires_grad_()
    with torch.no_grad():
        results = vocab_parallel_log_probs(hidden, weight, given["labels"], temperature=1.0, vocab_size=V, group=None)
    assert all(result.grad_fn is None for result in results)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"vocab_size": PADDED + 1}, "vocab_size=49; the head has 1 x 48 rows"),
        ({"slice_tokens": 0}, "slice_tokens=0"),
        ({"labels": torch.tensor([1, 2, V])}, r"labels\[2\]=37; must be in \[0, 37\)"),
        ({"labels": torch.tensor([1, -100, 3])}, r"labels\[1\]=-100"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"labels": torch.tensor([1, 2, 3]), "temperature": 1.0, "vocab_size": V, "group": None}
    with pytest.raises(ValueError, match=message):
        vocab_parallel_log_probs(torch.zeros(3, H), torch.zeros(PADDED, H), **(arguments | change))


def run_rank(rank: int, tp: int, folder: str) -> None:
    """Run one gloo rank with its rows of the head; write its results and the number of collectives."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=tp)
    given = make_problem()
    given["weight"] = given["weight"].chunk(tp)[rank].contiguous()
    calls: list[str] = []
    gather = dist.all_gather_into_tensor

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append("all_gather_into_tensor")
        return gather(*args, **kwargs)

    dist.all_gather_into_tensor = counted
    hidden, weight = given["hidden"].requires_grad_(), given["weight"].requires_grad_()
    log_probs, entropy = vocab_parallel_log_probs(
        hidden, weight, given["labels"], temperature=0.7, vocab_size=V, group=dist.group.WORLD, slice_tokens=5
    )
    forward_calls = len(calls)
    results = gradients_of(hidden, weight, log_probs, entropy, given, USES[2])
    torch.save({"results": results, "calls": (forward_calls, len(calls))}, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("tp", [2, 4, 6])
def test_gloo_ranks_agree_bit_for_bit_with_one_collective(tp: int, tmp_path: Path) -> None:
    # tp=4: the last rank holds one row of the vocabulary; tp=6: none
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=run_rank, args=(rank, tp, str(tmp_path))) for rank in range(tp)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in processes] == [0] * tp

    saved = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(tp)]
    ranks = [entry["results"] for entry in saved]
    assert [entry["calls"] for entry in saved] == [(1, 1)] * tp
    for other in ranks[1:]:
        assert torch.equal(other["log_probs"], ranks[0]["log_probs"])
        assert torch.equal(other["entropy"], ranks[0]["entropy"])
    joined = {
        "log_probs": ranks[0]["log_probs"],
        "entropy": ranks[0]["entropy"],
        "grad_hidden": torch.stack([results["grad_hidden"] for results in ranks]).sum(dim=0),
        "grad_weight": torch.cat([results["grad_weight"] for results in ranks]),
    }
    assert_close(joined, compute_oracle(make_problem(), 0.7, USES[2]), tolerance=1e-6)
