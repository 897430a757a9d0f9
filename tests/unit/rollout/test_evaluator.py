"""Results of an evaluation of scripted samples of two held-out sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from grpo_mega.config.rollout_sections import EvaluationConfig
from grpo_mega.data.dataset import DataSet
from grpo_mega.observe.summary import Evaluation
from grpo_mega.rollout.evaluator import Evaluator
from grpo_mega.rollout.sampled_groups import SampledGroups
from grpo_mega.rollout.sampler import Sampler
from grpo_mega.types import Completion, Prompt, Reward, Rollout, SamplingOptions, SamplingRequest

# answers to each prompt: those of the samples, then the greedy one; "7" is right, "6" could not be scored
ANSWERS = {0: "7787" + "7", 1: "8897" + "8", 2: "9999" + "9", 3: "7668" + "6", 4: "6666" + "6"}


class ScriptedSampler:
    def __init__(self) -> None:
        self.seeds: list[Sequence[object]] = []
        self.requests: list[SamplingRequest] = []

    def sample(self, prompts: Sequence[Prompt], request: SamplingRequest, seed_of: Sequence[object]) -> SampledGroups:
        self.seeds.append(seed_of)
        self.requests.append(request)
        rollouts = []
        for prompt in prompts:
            answers = ANSWERS[prompt.index][4:] if request.temperature == 0 else ANSWERS[prompt.index][:4]
            for text in answers[: request.group_size]:
                right = float(text == "7")
                completion = Completion((1,) * int(text), (0.0,) * int(text), "eos", 0, text)
                reward = Reward(right / 2, {"exact": right})
                if text == "6":
                    reward = Reward(None, {}, ("exact",))
                rollouts.append(Rollout(prompt, completion, reward, 0))
        return SampledGroups.of(rollouts, request.group_size)


def run_evaluation(sets: list[DataSet], **config: Any) -> Evaluation:
    sampler = cast("Sampler", ScriptedSampler())
    return Evaluator(sampler, sets, EvaluationConfig(**config), 8, 0, {"exact": 1.0}, lambda array: array).evaluate()


def make_prompts(*indices: int) -> tuple[Prompt, ...]:
    return tuple(Prompt(i, "q", (1,), "7") for i in indices)


def test_sampling_options_reach_the_engine_with_samples_and_greedy_answers() -> None:
    sampler = ScriptedSampler()
    keys: dict[str, Any] = {
        "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": 0.5,
        "frequency_penalty": -0.5, "logit_bias": {3: -1.5, 0: 2.0}, "bad_words": ("no",),
    }  # fmt: skip
    for config in (EvaluationConfig(), EvaluationConfig(**keys)):
        sets = [DataSet("easy", make_prompts(0))]
        Evaluator(cast("Sampler", sampler), sets, config, 8, 0, {"exact": 1.0}, lambda array: array).evaluate()
    wanted = SamplingOptions(0.9, 5, 0.1, 1.1, 0.5, -0.5, ((0, 2.0), (3, -1.5)), ("no",))
    assert [request.options for request in sampler.requests] == [SamplingOptions()] * 2 + [wanted] * 2


def test_one_set_reports_pass_at_1_k_and_majority() -> None:
    found = run_evaluation([DataSet("easy", make_prompts(0, 1))], k=4, report_k=(1, 2, 4))
    assert (found.accuracy, found.greedy_accuracy, found.num_prompts) == (4 / 8, 1 / 2, 2)
    assert found.reward_mean == 4 / 16
    assert found.length_mean == (7 + 7 + 8 + 7 + 8 + 8 + 9 + 7) / 8
    # prompt 0 has 3 right of 4, prompt 1 has 1: pass@2 = 1 - C(1, 2) / C(4, 2) and 1 - C(3, 2) / C(4, 2)
    assert found.pass_at_k == {"1": (3 / 4 + 1 / 4) / 2, "2": (1 + 1 / 2) / 2, "4": 1.0}
    # runs of two: (7 7)(8 7) and (8 8)(9 7)
    assert found.majority_at_k == {"1": 1 / 2, "2": ((1 + 1 / 2) / 2 + (0 + 1 / 2) / 2) / 2, "4": 1 / 2}
    assert found.sets == {}


def test_several_sets_are_reported_together_and_by_name() -> None:
    easy, hard = DataSet("easy", make_prompts(0, 1)), DataSet("hard", make_prompts(2))
    both = run_evaluation([easy, hard], k=4)
    assert both.sets == {"easy": run_evaluation([easy], k=4), "hard": run_evaluation([hard], k=4)}
    assert (both.accuracy, both.num_prompts) == (4 / 12, 3)
    assert (both.sets["hard"].accuracy, both.sets["hard"].pass_at_k) == (0.0, {"4": 0.0})


def test_max_prompts_applies_to_each_set() -> None:
    found = run_evaluation([DataSet("easy", make_prompts(0, 1)), DataSet("hard", make_prompts(2))], k=4, max_prompts=1)
    assert {name: part.num_prompts for name, part in found.sets.items()} == {"easy": 1, "hard": 1}


def test_samples_without_a_reward_are_left_out_and_counted() -> None:
    found = run_evaluation([DataSet("easy", make_prompts(0, 3))], k=4, report_k=(2, 4))
    # prompt 0 has 3 right of 4; prompt 3 has 1 of the 2 that were scored
    assert (found.accuracy, found.reward_mean, found.greedy_accuracy) == (4 / 6, 4 / 12, 1.0)
    assert found.failed_fraction == 2 / 8
    assert found.pass_at_k == {"2": 1.0, "4": 1.0}  # 1 - C(1, 2) / C(4, 2) and 1 - C(1, 2) / C(2, 2)
    assert found.majority_at_k == {"2": ((1 + 1 / 2) / 2 + 1 / 2) / 2, "4": 1.0}  # prompt 3 has no 4 samples
    nothing = run_evaluation([DataSet("hard", make_prompts(4))], k=4)
    assert (nothing.accuracy, nothing.reward_mean, nothing.failed_fraction) == (0.0, 0.0, 1.0)


def test_the_first_term_that_applies_to_a_row_decides_whether_it_is_right() -> None:
    evaluator = Evaluator(
        cast("Sampler", ScriptedSampler()),
        [],
        EvaluationConfig(),
        8,
        0,
        {"gsm8k": 1.0, "exact": 2.0, "format": 1.0},
        lambda array: array,
    )
    rewards = [
        Reward(1.5, {"gsm8k": 1.0, "format": 0.5}),
        Reward(2.0, {"exact": 1.0, "format": 1.0}),
        Reward(None, {"format": 1.0}, ("exact",)),
    ]
    prompt, completion = Prompt(0, "", (1,), ""), Completion((1,), (0.0,), "eos", 0, "")
    own = {i: Rollout(prompt, completion, reward, 0) for i, reward in enumerate(rewards)}
    groups = SampledGroups.gather([prompt], 3, own, component_names=("gsm8k", "exact", "format"))
    assert evaluator.is_right(groups.table).tolist() == [True, False, False]
