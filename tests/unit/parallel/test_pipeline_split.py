"""The layers of each pipeline stage, worked by hand; errors name key, value, rule and remedy."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest

from grpo_mega.config.policy_sections import ParallelConfig
from grpo_mega.parallel.pipeline_split import stage_layers
from grpo_mega.types import UserError
from tests.helpers.error_messages import assert_names


def split_stages(num_layers: int, **keys: Any) -> list[range]:
    return stage_layers(num_layers, ParallelConfig(**keys), "the model")


@pytest.mark.parametrize(
    ("num_layers", "keys", "counts"),
    [
        (3, {}, [3]),
        (6, {"pp": 3}, [2, 2, 2]),
        (8, {"pp": 2, "vpp": 2}, [2, 2, 2, 2]),
        (6, {"pp": 2, "num_layers_first_stage": 2, "num_layers_last_stage": 4}, [2, 4]),
        (5, {"pp": 2, "num_layers_first_stage": 1}, [1, 4]),
        (7, {"pp": 4, "num_layers_first_stage": 1, "num_layers_last_stage": 2}, [1, 2, 2, 2]),
        (6, {"pp": 2, "vpp": 2, "num_layers_last_stage": 2}, [2, 1, 2, 1]),
        (5, {"pp": 4, "pipeline_layout": "Ett|t|tt|L"}, [2, 1, 2, 0]),
        (4, {"pp": 2, "vpp": 2, "pipeline_layout": "E,t|(t,|)*2,tL"}, [1, 1, 1, 1]),
        (61, {"pp": 16, "pipeline_layout": "Et*4|(t*4|)*14tL"}, [4] * 15 + [1]),
    ],
)
def test_counts_by_hand(num_layers: int, keys: dict[str, Any], counts: list[int]) -> None:
    found = split_stages(num_layers, **keys)
    assert [len(layers) for layers in found] == counts
    assert list(chain.from_iterable(found)) == list(range(num_layers))


@pytest.mark.parametrize(
    "text", ["Ett|t|tt|tL", "E|(t|)*6L", "Et*2|(tt|t|)*2L", "E,t|t*3|t,t|L", "Ettttttt|L", "(E)*1t|(t|)*2tt*2L"]
)
def test_explicit_layouts_are_parsed_as_in_megatron(text: str) -> None:
    from grpo_mega.policy.megatron_patches import cpu

    cpu.prepare_import()
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    megatron_split = [sum(x.name == "decoder" for x in s) for s in PipelineParallelLayerLayout.parse_str_to_list(text)]
    found = split_stages(sum(megatron_split), pp=len(megatron_split), pipeline_layout=text)
    assert [len(layers) for layers in found] == megatron_split


@pytest.mark.parametrize(
    ("num_layers", "keys", "named"),
    [
        (6, {"pp": 4}, ["parallel.pp=4", "6 layers", "use one of 1, 2, 3, 6", "parallel.pipeline_layout"]),
        (6, {"pp": 2, "vpp": 2}, ["parallel.vpp=2", "3 layers of a pipeline rank", "pp=2", "use one of 1, 3"]),
        (
            6,
            {"pp": 3, "num_layers_first_stage": 1},
            ["parallel.num_layers_first_stage=1", "5 of the 6 layers", "2 other pipeline rank(s)", "change them"],
        ),
        (
            6,
            {"pp": 2, "num_layers_first_stage": 1, "num_layers_last_stage": 4},
            [
                "parallel.num_layers_first_stage=1",
                "parallel.num_layers_last_stage=4",
                "1 of the 6 layers",
                "0 other pipeline rank(s)",
                "change them",
            ],
        ),
        (
            6,
            {"pp": 2, "num_layers_last_stage": 7},
            ["parallel.num_layers_last_stage=7", "-1 of the 6 layers", "1 other pipeline rank(s)", "change them"],
        ),
        (
            2,
            {"pp": 2, "pipeline_layout": "Et|mtL"},
            ["parallel.pipeline_layout=Et|mtL", "'m'", "use E, t, L, |", "t*3"],
        ),
        (
            3,
            {"pp": 2, "pipeline_layout": "Et|t|tL"},
            ["parallel.pipeline_layout=Et|t|tL", "3 stages", "parallel.pp", "parallel.vpp", "2 x 1", "change one"],
        ),
        (
            2,
            {"pp": 2, "pipeline_layout": "tE|tL"},
            ["parallel.pipeline_layout=tE|tL", "begin", "E (embedding)", "end", "L (head)"],
        ),
        (
            3,
            {"pp": 2, "pipeline_layout": "Et|tL"},
            ["parallel.pipeline_layout=Et|tL", "2 layers", "3", "use as many"],
        ),
        *(
            (
                2,
                {"pp": 3, **keys},
                ["parallel.pp=3", "pipeline rank 1", "2 layers", "parallel.pipeline_layout", "use fewer stages"],
            )
            for keys in (
                {"vpp": 2, "pipeline_layout": "E||tt|||L"},
                {"num_layers_first_stage": 1, "num_layers_last_stage": 1},
            )
        ),
    ],
)
def test_a_split_that_does_not_divide_is_rejected(num_layers: int, keys: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        split_stages(num_layers, **keys)
    assert_names(caught.value, *named)
