"""tools/plan.py: published models fit or not, a suggested remedy fits, and the output can be read by programs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from grpo_mega.cli.plan import main
from grpo_mega.config.load import load_config
from grpo_mega.planner.hardware import cluster_of, gpu_named
from grpo_mega.planner.inputs import PlanInputs
from grpo_mega.planner.plan import ResourcePlan
from grpo_mega.planner.remedies import even_layout, remedy
from tests.helpers.planner_cases import spec_of

REPOSITORY = Path(__file__).resolve().parents[3]
CONFIGS = REPOSITORY / "configs"
PRODUCTION = sorted(path.name for path in CONFIGS.glob("*n8g*.yaml"))
# parameter counts from model cards and papers
PUBLISHED_BILLIONS = {"qwen2.5-7b": 7.62, "qwen2.5-32b": 32.76, "llama-3.3-70b": 70.55, "qwen3-30b": 30.53,
                      "qwen3-235b": 235.09, "deepseek-v3": 671.03}  # fmt: skip
QWEN = str(CONFIGS / "qwen2.5-7b-1n8g-tp2-vllm.yaml")
QWEN32 = str(next(CONFIGS.glob("qwen2.5-32b-4n8g-*.yaml")))
LLAMA = str(CONFIGS / "llama-3.3-70b-8n8g-tp8pp2-vllm.yaml")
DEEPSEEK_64 = str(CONFIGS / "deepseek-v3-671b-8n8g-tp8pp8ep8-host-vllm.yaml")


def run_plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any], str]:
    code = main([*arguments, "--json"])
    streams = capsys.readouterr()
    return code, json.loads(streams.out.splitlines()[-1]), streams.err


def test_there_is_a_config_for_each_published_size() -> None:
    assert {name.split("-")[0] + "-" + name.split("-")[1] for name in PRODUCTION} >= {"qwen2.5-7b", "qwen2.5-32b"}
    assert len(PRODUCTION) == 12


@pytest.mark.parametrize("name", PRODUCTION)
def test_each_production_config_loads_and_fits_on_the_devices_of_its_name(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes = int(re.search(r"-(\d+)n8g-", name)[1])  # type: ignore[index]
    assert load_config(CONFIGS / name).run.world_size == 8 * nodes
    code, found, _ = run_plan(capsys, str(CONFIGS / name))
    assert code == 0
    assert found["fits"] is True
    assert found["ranks"] == 8 * nodes
    published = next(size for model, size in PUBLISHED_BILLIONS.items() if name.startswith(model))
    assert found["parameters"] / 1e9 == pytest.approx(published, abs=0.01)
    assert set(found["peak_bytes"]) == {"rollout", "log_probs", "train", "sync"}
    assert max(found["peak_bytes"].values()) <= found["device_bytes"]
    assert found["step_seconds"] == pytest.approx(sum(found["phase_seconds"].values()))
    assert 0 < found["mfu"] < 0.5
    for key in ("remedy", "sync_bytes", "host_bytes_per_node", "tokens_per_second", "days"):
        assert key in found


@pytest.mark.parametrize(
    "arguments",
    [
        (LLAMA, "--nodes", "1", "parallel.pp=1"),
        (DEEPSEEK_64, "optimizer.host_fraction=0"),
        (QWEN, "parallel.recompute=none", "--gpu", "h100-80g", "engine.tp=1",
         "train.max_tokens_per_microbatch=32768"),
    ],
    ids=["70B-full-Adam-on-8", "671B-full-optimizer-on-64", "7B-with-long-rows"],
)  # fmt: skip
def test_a_plan_that_does_not_fit_has_a_remedy_that_fits(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    code, found, errors = run_plan(capsys, *arguments)
    assert code == 2
    assert found["fits"] is False
    assert found["remedy"]
    assert "does not fit" in errors
    assert errors.startswith("error: ")
    again, fitting, _ = run_plan(capsys, *arguments, *found["remedy"])
    assert (again, fitting["fits"]) == (0, True)


def test_data_parallel_engine_ranks_share_experts_and_replicate_attention(capsys: pytest.CaptureFixture[str]) -> None:
    """Plan Qwen3-30B-A3B in bf16 with eight ranks per replica: 48 layers of 128 experts of 3 x 2048 x 768."""
    config = str(CONFIGS / QWEN_30)
    layouts = {"tp4": ("engine.tp=4", "engine.ep=4"), "tp4dp2": ("engine.tp=4", "engine.dp=2", "engine.ep=8")}
    held, seconds = {}, {}
    for name, keys in layouts.items():
        code, found, _ = run_plan(capsys, config, *keys)
        assert code == 0
        held[name] = found["pipeline_ranks"][0]["phases"]["sync"]["engine weights"]
        seconds[name] = found["phase_seconds"]["rollout"]
    assert held["tp4"] - held["tp4dp2"] == 2 * 48 * 128 * 3 * 2048 * 768 / 8
    assert seconds["tp4dp2"] < seconds["tp4"]  # a rank reads fewer experts in a step
    assert main([config, "engine.dp=3"]) == 2
    assert "engine.tp x engine.dp" in capsys.readouterr().err


DEEPSEEK = "deepseek-v3-671b-32n8g-tp2pp16ep16-vllm.yaml"
QWEN_235 = "qwen3-235b-a22b-16n8g-tp2pp8ep16-vllm.yaml"
QWEN_30 = "qwen3-30b-a3b-2n8g-ep8-vllm.yaml"
# project -> config of the model here, and the layout of the project (NeMo-RL's performance summary r0.6.0; verl's
# docs/perf and device tuning; slime's model pages), with the optimizer on the host where the project has it there
OTHERS: dict[str, tuple[str, ...]] = {
    "NeMo-RL DeepSeek-V3 on 256": (
        DEEPSEEK, "parallel.tp=1", "parallel.sequence_parallel=false", "sampling.max_tokens=512",
        "train.max_tokens_per_microbatch=1536",
    ),
    "NeMo-RL Qwen3-235B on 128": (QWEN_235, "parallel.cp=2"),
    "NeMo-RL Qwen3-30B-A3B on 32": (QWEN_30, "--nodes", "4"),
    "NeMo-RL 32B dense on 32": ("qwen2.5-32b-4n8g-tp4pp2-vllm.yaml", "parallel.pp=4"),
    "verl DeepSeek-V3 on 96 H20": (
        DEEPSEEK, "--gpu", "h20-96g", "--nodes", "12", "parallel.tp=8", "parallel.pp=12", "parallel.ep=8",
        f"parallel.pipeline_layout={even_layout(61, 12)}", "optimizer.host_fraction=1.0",
    ),
    "verl Qwen3-235B on 32 H20": (
        QWEN_235, "--gpu", "h20-96g", "--nodes", "4", "parallel.tp=4", "parallel.ep=4", "optimizer.host_fraction=1.0",
    ),
    "slime Qwen3-30B-A3B on 8": (QWEN_30, "--nodes", "1", "optimizer.host_fraction=1.0"),
}  # fmt: skip


@pytest.mark.parametrize("who", OTHERS)
def test_layouts_of_other_projects_fit(who: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, *arguments = OTHERS[who]
    code, found, _ = run_plan(capsys, str(CONFIGS / name), *arguments)
    assert (code, found["problems"]) == (0, [])


def test_an_optimizer_on_the_host_takes_time(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = {
        share: run_plan(capsys, DEEPSEEK_64, f"optimizer.host_fraction={share}")[1]["phase_seconds"]["optimizer"]
        for share in ("0.0", "1.0")
    }
    assert seconds["1.0"] > 10 * seconds["0.0"]


def test_search_lists_layouts_that_fit_fastest_first(capsys: pytest.CaptureFixture[str]) -> None:
    code, found, _ = run_plan(capsys, QWEN, "--nodes", "1", "--search")
    seconds = [layout["step_seconds"] for layout in found["layouts"]]
    assert code == 0
    assert len(seconds) == 5
    assert seconds == sorted(seconds)
    assert all(layout["fits"] for layout in found["layouts"])
    best = found["layouts"][0]
    assert run_plan(capsys, QWEN, *best["overrides"])[1]["fits"]


def test_a_search_without_a_fitting_layout_is_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([LLAMA, "--nodes", "1", "--search", "--gpu", "h100-80g", "engine.kv_cache_tokens=100000000"]) == 2
    assert "no layout fits on 8" in capsys.readouterr().err


def test_the_picture_has_every_phase_and_the_line_of_the_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "memory.html"
    assert main([QWEN, "--html", str(path)]) == 0
    text = path.read_text()
    for phase in ("rollout", "log_probs", "train", "sync"):
        assert f">{phase}</text>" in text
    assert "79.1 GiB" in text
    assert text.count("<rect") > 12
    assert "<script" not in text
    capsys.readouterr()


def test_every_item_of_every_phase_has_a_color(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "memory.html"
    for gpu in ("cpu", "h100-80g"):
        main([str(CONFIGS / "quickstart.yaml"), "--gpu", gpu, "algorithm.name=ppo", "--html", str(path)])
        assert ">value</text>" in path.read_text()
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpu", "h101"), "--gpu=h101"),
        (("--nodes", "0"), "--nodes=0 must be at least 1; use --nodes=1"),
        (("--nodes", "-3"), "--nodes=-3 must be at least 1; use --nodes=1"),
        (("--gpus-per-node", "0"), "--gpus-per-node=0 must be at least 1; use --gpus-per-node=1"),
        (("--assume", "mean_lenght=0.2"), "--assume=mean_lenght=0.2 is not an assumption of the planner; did you mean"),
        (("--assume", "mean_length=2"), "--assume=mean_length=2 must be a number above 0, at most 1; use --assume"),
        (("--assume", "link=fast"), "--assume=link=fast must be a number above 0; use --assume link=NUMBER"),
        (("--assume", "link"), "--assume=link must be a number above 0; use --assume link=NUMBER"),
        (("engine.memory_share=0.1",), "engine.memory_share=0.1 is 7.9 of 79.1 GiB"),
        (("--nodes", "3", "--html", "memory.html"), "--html=memory.html needs one layout"),
        (("parallel.tp=3", "run.world_size=24"), "parallel.tp=3 does not divide the 64 attention heads"),
        (("model.path=/no/such",), "model.path=/no/such has no config.json"),
        (("engine.kv_cache_tokens=32",), "; use at least "),
        (("engine.kv_cache_tokens=32", "--search"), "; use at least "),
    ],
)
def test_wrong_input_is_exit_2_with_one_message(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([LLAMA, *arguments]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert message in errors
    assert "Traceback" not in errors


def server_overrides(number: int) -> tuple[str, str]:
    return "engine.placement=server", f"engine.urls={[f'host{i}:1' for i in range(number)]}"


def test_servers_use_devices_in_addition_to_those_of_the_job(capsys: pytest.CaptureFixture[str]) -> None:
    _, beside, _ = run_plan(capsys, QWEN, "engine.tp=2")
    _, two, _ = run_plan(capsys, QWEN, "engine.tp=2", *server_overrides(2))
    assert (two["ranks"], two["server_ranks"], beside["server_ranks"]) == (8, 4, 0)
    assert two["sync_bytes"] * 2 == beside["sync_bytes"]  # four ranks store an engine, where eight did
    assert two["mfu"] * two["step_seconds"] * 12 == pytest.approx(beside["mfu"] * beside["step_seconds"] * 8)


def test_a_step_with_servers_offloads_nothing_and_samples_on_the_servers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    served_by = {n: run_plan(capsys, QWEN, "engine.tp=2", *server_overrides(n))[1] for n in (2, 4, 8)}
    seconds = {n: found["phase_seconds"] for n, found in served_by.items()}
    on_four = run_plan(capsys, QWEN, "engine.tp=2", "run.world_size=4")[1]["phase_seconds"]
    assert seconds[2]["offload"] == 0 < on_four["offload"]
    assert seconds[2]["rollout"] == on_four["rollout"]  # two engines of two ranks, too
    # All weights cross the network; with 16 server ranks, each of the 8 ranks of the job sends twice as much.
    between_nodes = cluster_of(gpu_named("h100-80g"), 8).link_speed(9)
    once = served_by[8]["sync_bytes"] / 16 / between_nodes
    assert seconds[8]["sync"] - seconds[4]["sync"] == pytest.approx(once, rel=1e-6)
    assert seconds[4]["sync"] == seconds[2]["sync"] > once


def test_items_that_do_not_fit_on_a_server_are_reported_for_the_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([QWEN, *server_overrides(2), "engine.kv_cache_tokens=2000000"]) == 2
    words = capsys.readouterr().out
    assert "2 replica(s) on 2 more" in words
    assert re.search(r"^  server: [0-9.]+ GiB on a server, the device has 79\.1$", words, re.MULTILINE)
    assert re.search(r"^  server +[0-9.]+  KV cache ", words, re.MULTILINE)
    assert re.search(r"^  train +[0-9.]+  \(pp 0\) ", words, re.MULTILINE)


def test_search_finds_servers_that_fit_for_any_policy_memory(capsys: pytest.CaptureFixture[str]) -> None:
    code, found, _ = run_plan(capsys, QWEN32, "--nodes", "4", "--search", *server_overrides(2))
    assert code == 0
    assert all(layout["fits"] for layout in found["layouts"])


def test_the_remedy_for_a_server_is_not_limited_to_divisors_of_the_ranks_of_the_job() -> None:
    def remedy_of(*overrides: str) -> Any:
        config = load_config(
            Path(QWEN), ["run.world_size=6", "parallel.tp=1", "parallel.sequence_parallel=false", *overrides]
        )
        inputs = PlanInputs.from_config(config, spec_of(), cluster_of(gpu_named("cpu"), 6))
        # a plan that fits as soon as an engine has four ranks
        return remedy(
            cast(ResourcePlan, SimpleNamespace(inputs=inputs)),
            lambda c: cast(ResourcePlan, SimpleNamespace(inputs=inputs, fits=c.engine.tp == 4)),
            28,
        )

    assert remedy_of(*server_overrides(2)) == {"engine.tp": 4}
    assert remedy_of() != {"engine.tp": 4}


def test_the_quickstart_can_be_planned_for_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    code, found, _ = run_plan(capsys, str(CONFIGS / "quickstart.yaml"), "--gpu", "cpu", "run.world_size=2")
    assert code == 0
    assert found["parameters"] == pytest.approx(0.8e6, rel=0.05)


def test_an_even_layout_gives_the_first_stages_one_layer_more() -> None:
    assert even_layout(7, 3) == "Et*3|tt|ttL"
    assert even_layout(61, 8) == "Et*8|t*8|t*8|t*8|t*8|t*7|t*7|t*7L"


def test_a_cache_that_the_engine_would_reject_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("run.world_size=1", "engine.kv_cache_tokens=32", "evaluation.max_tokens=40")
    assert main([str(CONFIGS / "quickstart.yaml"), "--gpu", "cpu", *sizes]) == 2
    assert re.search(r"error: engine\.kv_cache_tokens=32 .* tokens; use at least \d+", capsys.readouterr().err)


def test_the_arguments_of_the_engine_are_checked_for_the_planned_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([QWEN, "engine.args={enforce_eager: true}", "--gpu", "h100-80g"]) in (0, 2)
    assert "engine.args" not in capsys.readouterr().err
    assert main([QWEN, "engine.args={max_num_seqs: 3}", "--gpu", "h100-80g"]) == 2
    assert "set engine.max_num_seqs" in capsys.readouterr().err


def test_nodes_that_the_layout_does_not_divide_are_searched(capsys: pytest.CaptureFixture[str]) -> None:
    """A layout of 16 devices on 3 nodes."""
    config = "llama-3.3-70b-8n8g-tp8pp2-vllm.yaml"
    assert main([LLAMA, "--nodes", "3", "--gpu", "h200-141g", "--json"]) == 0
    out = capsys.readouterr().out
    assert f"{config} does not divide 24 devices" in out
    assert "not a multiple of parallel.tp x parallel.cp x parallel.pp = 8 x 1 x 2" in out
    layouts = json.loads(out.splitlines()[-1])["layouts"]
    assert {layout["ranks"] for layout in layouts} == {24}
    seconds = [layout["step_seconds"] for layout in layouts]
    assert seconds == sorted(seconds)
    # a layout that is found can be planned, also with a pp that is not a power of two
    code, found, _ = run_plan(capsys, LLAMA, "--gpu", "h200-141g", *layouts[0]["overrides"])
    assert (code, found["step_seconds"]) == (0, pytest.approx(seconds[0]))


def test_nodes_of_another_size_have_their_part_of_the_host(capsys: pytest.CaptureFixture[str]) -> None:
    code, four, _ = run_plan(capsys, QWEN, "--nodes", "2", "--gpus-per-node", "4")
    assert (code, four["ranks"]) == (0, 8)
    _, eight, _ = run_plan(capsys, QWEN, "--nodes", "1")
    assert four["host_bytes_per_node"] * 2 == pytest.approx(eight["host_bytes_per_node"], rel=1e-6)
    assert main([QWEN, "--gpus-per-node", "4"]) == 0  # the 8 ranks of the config on two nodes
    out = capsys.readouterr().out
    assert "8 x h100-80g (2 node(s))" in out
    assert re.search(r"^  host +\d+  per node, of 931:", out, re.MULTILINE)


def test_an_assumption_can_be_replaced_by_a_measured_value(capsys: pytest.CaptureFixture[str]) -> None:
    _, usual, _ = run_plan(capsys, QWEN)
    _, short, _ = run_plan(capsys, QWEN, "--assume", "mean_length=0.1", "--assume", "engine_step=0.001")
    assert short["assumptions"]["mean_length"] == 0.1
    assert short["phase_seconds"]["rollout"] < usual["phase_seconds"]["rollout"] - 0.004 * 2048
    assert short["phase_seconds"]["train"] < 0.5 * usual["phase_seconds"]["train"]


def test_the_plan_counts_the_disk(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([QWEN, "--json"]) == 0
    out = capsys.readouterr().out
    disk = json.loads(out.splitlines()[-1])["disk_bytes"]
    assert disk["checkpoint"] == pytest.approx(7.62e9 * 14, rel=0.01)
    assert disk["checkpoints"] == pytest.approx(3 * disk["checkpoint"])  # two are kept while the third is written
    assert disk["export"] == pytest.approx(7.62e9 * 2, rel=0.01)
    assert disk["rollouts"] == pytest.approx(300 * disk["rollouts_per_step"])
    assert disk["run"] == pytest.approx(disk["checkpoints"] + disk["export"] + disk["rollouts"])
    assert "3 checkpoint(s) of" in out
    assert "300 steps of" in out


RECIPES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.glob("recipes/*.yaml"))
ON_CPU = sorted(path.name for path in CONFIGS.glob("*.yaml") if path.name not in PRODUCTION)


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_is_planned_without_the_folder_of_its_model(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, found, errors = run_plan(capsys, str(CONFIGS / name))
    assert (code, errors, found["problems"]) == (0, "", [])


@pytest.mark.parametrize("name", ON_CPU)
def test_each_small_config_is_planned_for_the_cpu(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, found, errors = run_plan(capsys, str(CONFIGS / name), "--gpu", "cpu", "run.world_size=1")
    assert (code, errors, found["problems"]) == (0, "", [])
