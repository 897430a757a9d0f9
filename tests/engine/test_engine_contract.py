"""The contract that every engine must fulfill, tested with the real vLLM, the real SGLang and a vLLM server on CPU.

Each engine runs with one rank.
"""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from grpo_mega.data.answer_ends import cut_at_stop
from grpo_mega.data.chat import load_tokenizer
from grpo_mega.models.digest import slice_digest
from grpo_mega.observe.engine_gauges import EngineGauges
from grpo_mega.types import Completion, Prompt, SamplingOptions, TensorSlice
from tests.helpers.engine_contract import (
    COLOCATED,
    ENDS,
    ONLY_SGLANG,
    PROMPTS,
    SAMPLING,
    generate,
    greedy_answer,
    kept_by,
    largest_log_prob_error,
    push,
    text_of,
    tokens,
)
from tests.helpers.engine_ranks import EngineRanks, RankSession


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_log_probs_equal_transformers(engine: EngineRanks, models: dict[str, Path], temperature: float) -> None:
    groups = engine.call(generate, PROMPTS, replace(SAMPLING, temperature=temperature))[0]
    assert [len(group) for group in groups] == [8] * len(PROMPTS)
    assert largest_log_prob_error(models["qwen3"], PROMPTS, groups, temperature) <= 2e-5
    # The tolerance detects a wrong temperature.
    assert largest_log_prob_error(models["qwen3"], PROMPTS, groups, temperature * 1.05) > 1e-3


def test_log_probs_and_version_follow_the_weights(engine: EngineRanks, models: dict[str, Path]) -> None:
    before = engine.call(generate, PROMPTS, SAMPLING)[0]
    assert engine.call(regions)[0] >= 25  # slices are written, not whole tensors streamed
    engine.call(push, models["other"], 7)
    after = engine.call(generate, PROMPTS, SAMPLING)[0]
    assert largest_log_prob_error(models["other"], PROMPTS, after, 1.0) <= 2e-5
    assert largest_log_prob_error(models["qwen3"], PROMPTS, after, 1.0) > 0.1
    assert {c.policy_version for group in before for c in group} == {0}
    assert {c.policy_version for group in after for c in group} == {7}


def generate_and_take_gauges(session: RankSession) -> tuple[list[list[Completion]], EngineGauges, EngineGauges]:
    generate(session, PROMPTS, SAMPLING)
    session.engine.take_gauges()
    groups = generate(session, PROMPTS, replace(SAMPLING, max_tokens=20, continues=True))
    return groups, session.engine.take_gauges(), session.engine.take_gauges()


def test_gauges_describe_the_requests_since_the_last_call(engine: EngineRanks) -> None:
    groups, gauges, after = engine.call(generate_and_take_gauges)[0]
    assert gauges.completion_tokens == sum(len(c.token_ids) for group in groups for c in group)
    assert gauges.prompt_tokens == SAMPLING.group_size * sum(len(prompt.token_ids) for prompt in PROMPTS)
    assert 0 < gauges.cached_tokens < gauges.prompt_tokens  # the prefixes of the first call
    assert gauges.preemptions == 0
    assert gauges.readings > 0
    num_requests = SAMPLING.group_size * len(PROMPTS)
    assert 0 < gauges.most_running <= num_requests
    assert 0 < gauges.most_kv_cache <= 1
    assert gauges.running <= gauges.readings * num_requests
    assert after == EngineGauges()


def test_rollouts_end_with_eos_or_at_max_tokens(engine: EngineRanks) -> None:
    rollouts = [c for group in engine.call(generate, PROMPTS, SAMPLING)[0] for c in group]
    assert {c.stop_reason for c in rollouts} == {"eos", "length"}
    for completion in rollouts:
        if completion.stop_reason == "eos":
            assert completion.token_ids[-1] in ENDS
            assert not set(ENDS) & set(completion.token_ids[:-1])
        else:
            assert not set(ENDS) & set(completion.token_ids)
            assert len(completion.token_ids) == SAMPLING.max_tokens
        assert len(completion.sampler_log_probs) == len(completion.token_ids)
        assert completion.text == text_of(completion.token_ids.tolist())
    assert {c.token_ids[-1] for c in rollouts if c.stop_reason == "eos"} == set(ENDS)


def test_a_completion_ends_with_the_token_that_ends_a_stop_text(engine: EngineRanks, models: dict[str, Path]) -> None:
    stopping = replace(SAMPLING, stop=("7", "="), max_tokens=6)
    groups = engine.call(generate, PROMPTS, stopping)[0]
    rollouts = [c for group in groups for c in group]
    assert {c.stop_reason for c in rollouts} == {"eos", "length", "stop"}
    tokenizer, last_texts = load_tokenizer(models["config"]), set()
    for completion in rollouts:
        without_last = text_of(completion.token_ids[:-1].tolist())
        assert "7" not in without_last
        assert "=" not in without_last
        assert (completion.stop_reason == "stop") == completion.text.endswith(("7", "=", "7."))
        assert (completion.stop_reason == "eos") == (completion.token_ids[-1] in ENDS)
        if completion.stop_reason == "stop":
            last = text_of(completion.token_ids[-1:].tolist())
            last_texts.add(last)
            assert cut_at_stop(tokenizer, completion.token_ids.tolist(), ("7", "=")) == (
                without_last + last[0],
                last[0],
            )
        assert len(completion.sampler_log_probs) == len(completion.token_ids)
    assert last_texts == {"7", "=", "7."}
    assert largest_log_prob_error(models["qwen3"], PROMPTS, groups, 1.0) <= 2e-5
    assert engine.call(generate, PROMPTS, SAMPLING)[0] == engine.call(generate, PROMPTS, SAMPLING)[0]


@pytest.mark.parametrize("options", [SamplingOptions(top_k=2), SamplingOptions(top_p=0.4), SamplingOptions(min_p=0.6)])
def test_an_engine_samples_only_the_tokens_that_an_option_keeps(
    engine: EngineRanks, models: dict[str, Path], options: SamplingOptions
) -> None:
    filtered = engine.call(generate, PROMPTS, replace(SAMPLING, options=options))[0]
    assert all(kept_by(options, models["qwen3"], PROMPTS, filtered))
    assert not all(kept_by(options, models["qwen3"], PROMPTS, engine.call(generate, PROMPTS, SAMPLING)[0]))


@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(),
        SamplingOptions(presence_penalty=2.0),
        SamplingOptions(frequency_penalty=1.0),
        SamplingOptions(logit_bias=((7, 1.0), (3, -100.0))),
    ],
)
def test_penalties_and_biases_change_greedy_answers_as_worked_from_the_logits(
    engine: EngineRanks, models: dict[str, Path], options: SamplingOptions
) -> None:
    greedy = replace(SAMPLING, group_size=1, temperature=0.0)
    found = tokens(engine.call(generate, PROMPTS, replace(greedy, options=options))[0])
    assert found == [[greedy_answer(options, models["qwen3"], prompt, ENDS, 8)] for prompt in PROMPTS]
    if options != SamplingOptions():
        assert found != tokens(engine.call(generate, PROMPTS, greedy)[0])


@pytest.mark.parametrize("opened", ["vllm", "server"], indirect=True)
def test_a_repetition_penalty_counts_the_tokens_of_the_prompt(engine: EngineRanks, models: dict[str, Path]) -> None:
    greedy, options = replace(SAMPLING, group_size=1, temperature=0.0), SamplingOptions(repetition_penalty=2.0)
    found = tokens(engine.call(generate, PROMPTS, replace(greedy, options=options))[0])
    assert found == [[greedy_answer(options, models["qwen3"], prompt, ENDS, 8)] for prompt in PROMPTS]
    assert found != tokens(engine.call(generate, PROMPTS, greedy)[0])


@pytest.mark.parametrize("opened", ["vllm", "server"], indirect=True)
def test_bad_words_are_not_sampled(engine: EngineRanks) -> None:
    def texts(options: SamplingOptions) -> str:
        groups = engine.call(generate, PROMPTS, replace(SAMPLING, options=options))[0]
        return " ".join(text_of(c.token_ids.tolist()) for group in groups for c in group)

    assert "3" in texts(SamplingOptions())
    assert "5" in texts(SamplingOptions())
    barred = texts(SamplingOptions(bad_words=("3", "5")))
    assert not {"3", "5"} & set(barred)


def test_more_rollouts_than_max_num_seqs_and_no_prompts_work(engine: EngineRanks, models: dict[str, Path]) -> None:
    sampling = replace(SAMPLING, group_size=12)  # 60 rollouts, 48 at a time
    groups = engine.call(generate, PROMPTS, sampling)[0]
    assert largest_log_prob_error(models["qwen3"], PROMPTS, groups, 1.0) <= 2e-5
    assert engine.call(generate, [], SAMPLING) == [[]]


def regions(session: RankSession) -> int:
    if "served" in session.kept:
        return len(session.kept["served"].transfers)
    return len(session.engine.sink.layout())


def check_rejections(session: RankSession) -> None:
    sink = session.engine.sink
    norm = TensorSlice("model.norm.weight", (0,), (64,))
    with pytest.raises(RuntimeError, match=r"model\.norm\.weight\[0:64\] outside of an update"):
        sink.write(norm, torch.ones(64))
    sink.begin_update()
    with pytest.raises(ValueError, match=r"model\.norm\.weight\[1:65\] is not inside a slice"):
        sink.write(TensorSlice("model.norm.weight", (1,), (64,)), torch.ones(64))
    with pytest.raises(ValueError, match=r"model\.norm\.weight.*\[63\].*\[64\]"):
        sink.write(norm, torch.ones(63))
    with pytest.raises(ValueError, match=r"model\.norm\.weight.*bfloat16"):
        sink.write(norm, torch.ones(64, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="before the weights are complete"):
        session.engine.generate(PROMPTS, SAMPLING)
    sink.end_update(3)
    with pytest.raises(
        ValueError, match=r"prompt 4: 70 tokens plus max_tokens=27 exceed the engine's max_model_len=96"
    ):
        session.engine.generate(PROMPTS, replace(SAMPLING, max_tokens=27))


@COLOCATED
def test_wrong_writes_and_early_or_long_requests_are_rejected_by_name(engine: EngineRanks) -> None:
    engine.call(check_rejections)


def flip_one_element(session: RankSession, folder: Path) -> tuple[list[str], list[str]]:
    """Return the slices that differ from the files: after a push, and after one element was changed."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    sink = session.engine.sink

    def wrong() -> list[str]:
        slices = [region.placement.hf for region in sink.layout()]
        held = zip(slices, sink.digests(slices), strict=True)
        return [hf.name for hf, digest in held if digest != slice_digest(tensors[hf.name][hf.index], hf)]

    before = wrong()
    name = "model.layers.1.self_attn.k_proj.weight"
    if hasattr(session.engine, "_process"):  # by SGLang's own loader, not through the weight server
        tensors[name][5, 3] += 2**-20
        session.engine._process.call("load", pickle.dumps([(name, tensors[name])]))
        tensors[name][5, 3] -= 2**-20
    else:
        (region,) = [r for r in sink.layout() if r.placement.hf.name == name]
        sink._regions.read(region, region.placement.hf)[5, 3] += 2**-20  # aliases the parameter
    return before, wrong()


@COLOCATED
def test_a_digest_detects_one_changed_element(engine: EngineRanks, models: dict[str, Path]) -> None:
    before, after = engine.call(flip_one_element, models["qwen3"])[0]
    assert before == []
    assert after == ["model.layers.1.self_attn.k_proj.weight"]


def sample_second_turn(session: RankSession) -> tuple[list[Prompt], list[list[Completion]]]:
    """Sample a second turn, whose prompts are the completions of the first and one more token."""
    first = session.engine.generate(PROMPTS, SAMPLING)
    prompts = [
        replace(prompt, token_ids=(*prompt.token_ids, *completion.token_ids.tolist(), 5))
        for prompt, group in zip(PROMPTS, first, strict=True)
        for completion in group
    ]
    limits = tuple(1 + i % 5 for i in range(len(prompts)))
    request = replace(SAMPLING, group_size=1, seed=9, max_tokens_each=limits, continues=True)
    return prompts, session.engine.generate(prompts, request)


def test_each_rollout_of_a_second_turn_has_its_own_token_limit(engine: EngineRanks, models: dict[str, Path]) -> None:
    prompts, second = engine.call(sample_second_turn)[0]
    lengths = [(len(group[0].token_ids), group[0].stop_reason) for group in second]
    assert all(n == 1 + i % 5 if reason == "length" else n <= 1 + i % 5 for i, (n, reason) in enumerate(lengths))
    assert largest_log_prob_error(models["qwen3"], prompts, second, 1.0) <= 2e-5
    assert engine.call(sample_second_turn)[0][1] == second


def test_the_seed_determines_the_tokens(engine: EngineRanks) -> None:
    first, other, again = (engine.call(generate, PROMPTS, replace(SAMPLING, seed=seed))[0] for seed in (5, 6, 5))
    assert first == again
    assert tokens(first) != tokens(other)


def callbacks(session: RankSession) -> tuple[list[tuple[int, int]], bool]:
    seen: list[tuple[int, int]] = []
    by_place: dict[tuple[int, int], Completion] = {}

    def on_completion(position: int, member: int, completion: Completion) -> None:
        seen.append((position, member))
        by_place[position, member] = completion

    groups = session.engine.generate(PROMPTS, SAMPLING, on_completion)
    same = all(by_place[p, m] is completion for p, group in enumerate(groups) for m, completion in enumerate(group))
    return seen, same


def test_each_rollout_is_reported_once_and_the_short_ones_first(engine: EngineRanks) -> None:
    groups = engine.call(generate, PROMPTS, SAMPLING)[0]
    seen, same = engine.call(callbacks)[0]
    assert same
    assert sorted(seen) == [(position, member) for position in range(5) for member in range(8)]
    lengths = [len(groups[position][member].token_ids) for position, member in seen]
    assert lengths[0] < lengths[-1] == SAMPLING.max_tokens


def failing_callback(session: RankSession) -> bool:
    before = session.engine.generate(PROMPTS, SAMPLING)
    with pytest.raises(KeyError, match="reward"):
        session.engine.generate(PROMPTS, SAMPLING, mock.Mock(side_effect=KeyError("reward")))
    return bool(session.engine.generate(PROMPTS, SAMPLING) == before)


def test_the_engine_samples_as_before_after_a_failing_callback(engine: EngineRanks) -> None:
    assert engine.call(failing_callback) == [True]


def sleep_twice(session: RankSession, folder: Path, loses_weights: bool) -> bool:
    engine = session.engine
    before = engine.generate(PROMPTS, SAMPLING)
    for _ in range(2):
        engine.sleep()
        engine.sleep()
        with pytest.raises(RuntimeError, match="generate while kv_cache and weights sleep"):
            engine.generate(PROMPTS, SAMPLING)
        engine.wake("weights")
        with pytest.raises(RuntimeError, match="generate while kv_cache sleep"):
            engine.generate(PROMPTS, SAMPLING)
        engine.wake("kv_cache")
        engine.wake("kv_cache")
        if loses_weights:
            with pytest.raises(RuntimeError, match="before the weights are complete"):
                engine.generate(PROMPTS, SAMPLING)
            engine.sleep()
            engine.wake("weights")
            push(session, folder, 0)
            engine.wake("kv_cache")
    return bool(engine.generate(PROMPTS, SAMPLING) == before)


@COLOCATED
def test_an_engine_that_slept_samples_as_before_after_a_sync_and_not_earlier(
    engine: EngineRanks, models: dict[str, Path]
) -> None:
    assert engine.call(sleep_twice, models["qwen3"], True) == [True]


@pytest.mark.parametrize("opened", ["server"], indirect=True)
def test_an_engine_server_samples_after_wake_as_before_sleep(engine: EngineRanks, models: dict[str, Path]) -> None:
    assert engine.call(sleep_twice, models["qwen3"], False) == [True]


# Only SGLang: its processes, and whole tensors.


def push_whole_tensors(session: RankSession, folder: Path, other: Path) -> None:
    """Push through a sink that streams; tensors that it rejects do not reach SGLang."""
    from safetensors.torch import load_file

    from grpo_mega.engines.sglang.sink import SglangSink

    engine = session.engine
    tensors = {name: (tuple(t.shape), t.dtype) for name, t in load_file(folder / "model.safetensors").items()}
    engine._sink = sink = SglangSink(engine._process, "streaming was requested", tensors, bucket_bytes=64 * 1024)
    with pytest.raises(RuntimeError, match=r"write of model\.norm\.weight outside of an update"):
        sink.load("model.norm.weight", torch.ones(64))
    sink.begin_update()
    with pytest.raises(ValueError, match=r"model\.norm\.scale: the engine's model has no such tensor"):
        sink.load("model.norm.scale", torch.ones(64))
    with pytest.raises(ValueError, match=r"model\.norm\.weight: got a tensor of shape \[63\]; expected \[64\]"):
        sink.load("model.norm.weight", torch.ones(63))
    sink.load("model.norm.weight", torch.ones(64))
    with pytest.raises(ValueError, match=r"the update is incomplete: 24 tensors are missing, e\.g\. lm_head\.weight"):
        sink.end_update(8)
    with pytest.raises(RuntimeError, match="before the weights are complete"):
        engine.generate(PROMPTS, SAMPLING)
    sink.begin_update()
    for name, tensor in load_file(other / "model.safetensors").items():
        sink.load(name, tensor)
    sink.end_update(9)


@ONLY_SGLANG
def test_whole_tensors_are_checked_before_they_are_sent(engine: EngineRanks, models: dict[str, Path]) -> None:
    kept = engine.call(keep_sink)
    engine.call(push_whole_tensors, models["qwen3"], models["other"])
    groups = engine.call(generate, PROMPTS, SAMPLING)[0]
    engine.call(restore_sink)
    assert kept == [None]
    assert largest_log_prob_error(models["other"], PROMPTS, groups, 1.0) <= 2e-5
    assert {c.policy_version for group in groups for c in group} == {9}


def keep_sink(session: RankSession) -> None:
    session.kept["sink"] = session.engine._sink


def restore_sink(session: RankSession) -> None:
    session.engine._sink = session.kept["sink"]


def stub_packages_on_rank(session: RankSession) -> list[str]:
    """Return stub packages that are visible on the rank; they must exist only in SGLang's processes."""
    import importlib.util
    import sys

    return [name for name in ("sgl_kernel", "triton") if name in sys.modules or importlib.util.find_spec(name)]


@ONLY_SGLANG
def test_stub_packages_exist_only_in_sglangs_processes(engine: EngineRanks) -> None:
    assert engine.call(stub_packages_on_rank) == [[]]


def push_with_a_changed_buffer(session: RankSession, folder: Path) -> list[str]:
    """Return slices that differ from what was sent, after a bit of the buffer changed before the end of the update."""
    from safetensors.torch import load_file

    tensors, sink = load_file(folder / "model.safetensors"), session.engine.sink
    push(session, folder, 4, end=False)
    (start,) = [
        start for hf, _, start in session.engine._client._staged if hf.name == "model.layers.0.mlp.up_proj.weight"
    ]
    session.engine._client._staging.memory[start + 9] ^= 4
    sink.end_update(4)
    slices = [region.placement.hf for region in sink.layout()]
    held = zip(slices, sink.digests(slices), strict=True)
    return [hf.name for hf, digest in held if digest != slice_digest(tensors[hf.name][hf.index], hf)]


@ONLY_SGLANG
def test_a_bit_that_changes_between_rank_and_scheduler_is_found_by_the_digest(
    engine: EngineRanks, models: dict[str, Path]
) -> None:
    assert engine.call(push_with_a_changed_buffer, models["other"]) == [["model.layers.0.mlp.up_proj.weight"]]


def run_while_the_scheduler_has_a_request(session: RankSession) -> list[int]:
    """Run the commands that need idle schedulers while one has a request; return the lengths of its completions."""
    process, batch = session.engine._process, session.engine._requests.batch(PROMPTS[:1], SAMPLING)
    released = process.call("while_running", 80, "release", ["kv_cache", "weights"])
    process.call("resume", ["weights", "kv_cache"])
    finished = process.call("while_running", 80, "finish_update", 3)
    *_, sampled = process.stream("while_running", 80, "sample", batch, beat_seconds=60.0)
    return [released, finished, sampled]


@ONLY_SGLANG
def test_commands_wait_until_the_schedulers_are_idle(engine: EngineRanks) -> None:
    """A completion arrives before the scheduler is idle; SGLang ends its processes if it must release memory then."""
    assert engine.call(run_while_the_scheduler_has_a_request) == [[80, 80, 80]]
