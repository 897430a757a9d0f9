"""Rules between keys of different sections. Each is one function that raises `UserError` if the rule is broken.

They are checked before any process group exists. Rules that need the model's config.json are in
grpo_mega/doctor/model_rules.py.
"""

from __future__ import annotations

import math

from grpo_mega.config.algorithm_rules import check_algorithm
from grpo_mega.config.async_rules import check_asynchrony
from grpo_mega.config.data_rules import check_data
from grpo_mega.config.fp8_rules import check_fp8
from grpo_mega.config.guard_rules import check_guard
from grpo_mega.config.optimizer_rules import check_optimizer
from grpo_mega.config.partial_rules import check_partial
from grpo_mega.config.reward_rules import check_reward_sets
from grpo_mega.config.schema import Config
from grpo_mega.config.sft_rules import check_sft
from grpo_mega.types import UserError


def check(config: Config) -> None:
    """Raise UserError for the first broken rule."""
    for rule in (
        _one_model,
        _group_size,
        _layout_divides,
        _pipeline,
        _recompute,
        _overlap,
        _servers,
        _memory_share,
        _engine_divides,
        _sglang_data_parallel,
        _engine_fp8,
        _sequence_parallel,
        _microbatch_capacity,
        _minibatches,
        _evaluation,
        _options_of_vllm,
        _rewards,
        _shuffled_rewards,
        _environment,
        _tiny_base_tools,
        _local_checkpoints,
    ):
        rule(config)
    check_data(config.data)
    check_algorithm(config.algorithm)
    check_fp8(config)
    check_sft(config)
    check_optimizer(config)
    check_guard(config)
    check_asynchrony(config)
    check_partial(config)


def _local_checkpoints(config: Config) -> None:
    every, folder = config.checkpoint.local_every, config.checkpoint.local_dir
    if every is not None and folder is None:
        raise UserError(
            f"checkpoint.local_every={every} needs a folder on every machine",
            remedy="set checkpoint.local_dir to a folder of a local disk, or in /dev/shm",
        )
    if every is None and folder is not None:
        raise UserError(
            f"checkpoint.local_dir={folder} does nothing without checkpoint.local_every",
            remedy="set checkpoint.local_every, or remove it",
        )
    if folder is not None and not folder.startswith("/"):
        raise UserError(
            f"checkpoint.local_dir={folder} is not an absolute path", remedy="name a folder that all machines have"
        )


def _one_model(config: Config) -> None:
    if (config.model.path is None) == (config.model.base is None):
        raise UserError(
            "model: exactly one of model.path and model.base must be set",
            remedy="set model.path to a Hugging Face folder, or model.base to the recipe of a tiny model",
        )
    if config.model.revision is not None and not config.model.is_on_hub:
        path = "model.base is a recipe" if config.model.path is None else f"model.path={config.model.path} is a folder"
        raise UserError(
            f"model.revision={config.model.revision} has no effect: {path}, not the name of a model on the hub",
            remedy="leave it out",
        )


def _group_size(config: Config) -> None:
    size = config.sampling.group_size
    if size < 1:
        raise UserError(f"sampling.group_size={size} must be at least 1", remedy="use 1 or more")
    if size < 2 and config.algorithm.advantage not in ("batch", "gae"):
        raise UserError(
            f"sampling.group_size={size} must be at least 2: algorithm.advantage={config.algorithm.advantage} compares "
            "the rollouts of a group",
            remedy="use 2 or more",
        )


def _layout_divides(config: Config) -> None:
    world, parallel = config.run.world_size, config.parallel
    if world is not None:
        require_whole_grids(world, tp=parallel.tp, cp=parallel.cp, pp=parallel.pp, ep=parallel.ep, etp=parallel.etp)


def require_whole_grids(world: int, *, tp: int, cp: int, pp: int, ep: int, etp: int) -> None:
    """Check that the ranks hold whole replicas of the dense layers and of the experts.

    Raises:
        UserError: names the number of ranks that the layout divides.
    """
    if world % (tp * cp * pp):
        raise UserError(
            f"run.world_size={world} is not a multiple of parallel.tp x parallel.cp x parallel.pp = {tp} x {cp} x {pp}",
            remedy=f"use a multiple of {tp * cp * pp}",
        )
    if world % (etp * ep * pp):
        raise UserError(
            f"run.world_size={world} is not a multiple of parallel.etp x parallel.ep x parallel.pp = "
            f"{etp} x {ep} x {pp}",
            remedy=f"use a multiple of {math.lcm(etp * ep * pp, tp * cp * pp)}",
        )


def _pipeline(config: Config) -> None:
    parallel = config.parallel
    if parallel.pp == 1:
        for key in ("num_layers_first_stage", "num_layers_last_stage", "pipeline_layout"):
            if (got := getattr(parallel, key)) is not None:
                raise UserError(
                    f"parallel.{key}={got} does nothing with parallel.pp=1",
                    remedy=f"raise parallel.pp, or remove parallel.{key}",
                )
        if parallel.vpp > 1:
            raise UserError(
                f"parallel.vpp={parallel.vpp} does nothing with parallel.pp=1",
                remedy="raise parallel.pp, or remove parallel.vpp",
            )
    uneven = parallel.num_layers_first_stage is not None or parallel.num_layers_last_stage is not None
    if parallel.pipeline_layout is not None and uneven:
        raise UserError(
            f"parallel.pipeline_layout={parallel.pipeline_layout} is not supported with "
            "parallel.num_layers_first_stage and parallel.num_layers_last_stage: it already sets the layers of each "
            "stage",
            remedy="remove the other two keys",
        )


def _recompute(config: Config) -> None:
    parallel = config.parallel
    if parallel.recompute_modules is not None and parallel.recompute != "selective":
        raise UserError(
            f"parallel.recompute_modules does nothing with parallel.recompute={parallel.recompute}",
            remedy="set parallel.recompute=selective, or remove parallel.recompute_modules",
        )
    if parallel.recompute_modules == ():
        raise UserError(
            "parallel.recompute_modules=[] must name at least one module",
            remedy="name a module, or set parallel.recompute=none",
        )


def _overlap(config: Config) -> None:
    if config.parallel.overlap_param_gather and not config.parallel.overlap_grad_reduce:
        raise UserError(
            "parallel.overlap_param_gather=true needs parallel.overlap_grad_reduce=true: Megatron gathers parameters "
            "in the buckets of the gradient reduction",
            remedy="set both to true, or both to false",
        )


def _servers(config: Config) -> None:
    engine, world = config.engine, config.run.world_size
    if engine.placement == "colocated":
        for key, urls in (("engine.urls", engine.urls), ("engine.spare_urls", engine.spare_urls)):
            if urls:
                raise UserError(
                    f"{key}={list(urls)} does nothing with engine.placement=colocated",
                    remedy=f"set engine.placement=server, or remove {key}",
                )
        return
    if engine.kind != "vllm":
        raise UserError(
            f"engine.placement=server is not supported with engine.kind={engine.kind}",
            remedy="set engine.kind=vllm, or engine.placement=colocated",
        )
    if engine.dp > 1:
        raise UserError(
            f"engine.dp={engine.dp} is not supported with engine.placement=server: all ranks of a server sample the "
            "same rollouts",
            remedy="set engine.dp=1, and start one server per replica",
        )
    if not engine.urls:
        raise UserError(
            "engine.urls=[] must list the servers with engine.placement=server",
            remedy="start launch/serve.sh with this config on other devices, and list the addresses that it prints: "
            "engine.urls=[host:port, ...]",
        )
    named = [*engine.urls, *engine.spare_urls]
    if len(set(named)) < len(named):
        spare = f" and engine.spare_urls={list(engine.spare_urls)}" if engine.spare_urls else ""
        raise UserError(
            f"engine.urls={list(engine.urls)}{spare} must name each server once", remedy="remove the repeated address"
        )
    if world is not None:
        require_equal_parts(world, len(engine.urls))


def require_equal_parts(world: int, num_servers: int) -> None:
    """Raise UserError if the number of servers does not divide the number of ranks."""
    if world % num_servers:
        raise UserError(
            f"engine.urls lists {num_servers} servers, which does not divide run.world_size={world}: each server "
            "serves an equal part of the ranks",
            remedy=f"use a number of servers that divides {world}",
        )


def _memory_share(config: Config) -> None:
    share, tokens = config.engine.memory_share, config.engine.kv_cache_tokens
    if tokens is not None and share != type(config.engine).model_fields["memory_share"].default:
        raise UserError(
            f"engine.memory_share={share:g} does nothing with engine.kv_cache_tokens={tokens}, which sets the size of "
            "the KV cache",
            remedy="remove one of them",
        )


def _engine_divides(config: Config) -> None:
    engine = config.engine
    world = config.run.world_size if engine.placement == "colocated" else None
    ranks, keys = engine.tp, f"engine.tp={engine.tp}"
    if engine.dp > 1:
        ranks, keys = engine.tp * engine.dp, f"engine.tp x engine.dp = {engine.tp} x {engine.dp}"
    if world is not None and world % ranks:
        raise UserError(f"run.world_size={world} is not a multiple of {keys}", remedy=f"use a multiple of {ranks}")
    if engine.ep not in (1, ranks):
        raise UserError(
            f"engine.ep={engine.ep} must be 1 or {keys}: experts are distributed over all ranks of an engine, or over "
            "none",
            remedy=f"use 1 or {ranks}",
        )


def _sglang_data_parallel(config: Config) -> None:
    if config.engine.kind == "sglang" and config.engine.dp > 1:
        raise UserError(
            f"engine.dp={config.engine.dp} is not supported with engine.kind=sglang: its attention copies would not "
            "share the experts",
            remedy="set engine.dp=1: every engine.tp ranks form a replica",
        )


def _engine_fp8(config: Config) -> None:
    if config.engine.fp8 is None:
        return
    if config.engine.kind != "vllm":
        raise UserError(
            f"engine.fp8={config.engine.fp8} is not supported with engine.kind={config.engine.kind}: it is not known "
            "which of its kernels read quantized values as they are stored",
            remedy="set engine.kind=vllm, or remove engine.fp8",
        )
    if config.precision.dtype != "bf16":
        raise UserError(
            f"engine.fp8={config.engine.fp8} is not supported with precision.dtype={config.precision.dtype}: tensors "
            "that are not FP8 are bf16",
            remedy="set precision.dtype=bf16, or remove engine.fp8",
        )


def _sequence_parallel(config: Config) -> None:
    if config.parallel.sequence_parallel and config.parallel.tp == 1:
        raise UserError(
            "parallel.sequence_parallel=true does nothing with parallel.tp=1",
            remedy="raise parallel.tp, or remove parallel.sequence_parallel",
        )


def _microbatch_capacity(config: Config) -> None:
    parallel = config.parallel
    longest = config.longest_training_rollout
    chunks = 2 * parallel.cp * (parallel.tp if parallel.sequence_parallel else 1) if parallel.cp > 1 else 1
    padded = -(-longest // chunks) * chunks
    if config.train.max_tokens_per_microbatch < padded:
        why = f", padded to a multiple of {chunks} for parallel.cp={parallel.cp}" if chunks > 1 else ""
        keys = f"data.max_prompt_tokens + sampling.max_tokens = {longest}"
        if config.is_sft:
            keys = f"data.max_example_tokens={longest}"
        raise UserError(
            f"train.max_tokens_per_microbatch={config.train.max_tokens_per_microbatch} is less than {keys}{why}",
            remedy=f"raise it to {padded} or more",
        )


def _minibatches(config: Config) -> None:
    if config.train.minibatches_per_epoch > config.data.prompts_per_step:
        raise UserError(
            f"train.minibatches_per_epoch={config.train.minibatches_per_epoch} must be at most "
            f"data.prompts_per_step={config.data.prompts_per_step}: a minibatch holds whole groups",
            remedy=f"use {config.data.prompts_per_step} or fewer",
        )


def _evaluation(config: Config) -> None:
    evaluation = config.evaluation
    turned_off = "eval" in config.data.model_fields_set  # data.eval=null alone turns evaluation off
    if evaluation.every is not None and config.data.eval is None and not turned_off:
        raise UserError(
            f"evaluation.every={evaluation.every} does nothing without data.eval",
            remedy="set data.eval, or data.eval=null",
        )
    wrong = [k for k in evaluation.report_k or () if not 1 <= k <= evaluation.k]
    if wrong:
        raise UserError(
            f"evaluation.report_k={list(evaluation.report_k or ())} must hold numbers from 1 to "
            f"evaluation.k={evaluation.k}",
            remedy=f"remove {wrong[0]}, or raise evaluation.k",
        )


def _options_of_vllm(config: Config) -> None:
    evaluation, kind = config.evaluation, config.engine.kind
    if kind == "vllm":
        return
    if evaluation.bad_words:
        raise UserError(
            f"evaluation.bad_words={list(evaluation.bad_words)} is not supported with engine.kind={kind}, which can "
            "only bar single tokens",
            remedy="use evaluation.logit_bias={TOKEN: -100}, or engine.kind=vllm",
        )
    if evaluation.repetition_penalty != 1:
        raise UserError(
            f"evaluation.repetition_penalty={evaluation.repetition_penalty} is not supported with engine.kind={kind}, "
            "which leaves the tokens of the prompt out",
            remedy="use evaluation.presence_penalty, or engine.kind=vllm",
        )


def _rewards(config: Config) -> None:
    if not config.has_engine:
        return
    if "reward" not in config.model_fields_set:
        raise UserError("reward: this key is required", remedy="set it, for example reward.terms=[{name: exact}]")
    if not config.reward.terms:
        raise UserError(
            "reward.terms=[] must hold at least one reward", remedy="add a reward, for example {name: exact}"
        )
    check_reward_sets(config)


def _shuffled_rewards(config: Config) -> None:
    if config.reward.shuffle and config.algorithm.advantage == "process":
        raise UserError(
            "reward.shuffle=true is not supported with algorithm.advantage=process: step rewards cannot be moved to "
            "another rollout",
            remedy="use another algorithm.advantage",
        )


def _environment(config: Config) -> None:
    environment = config.environment
    if environment is not None and any(not text for text in environment.stop or ()):
        raise UserError(
            "environment.stop must not hold an empty text: it would end every turn at once",
            remedy="remove the empty text",
        )


def _tiny_base_tools(config: Config) -> None:
    base = config.model.base
    if base is None or not base.tool_fraction:
        return
    if base.tokenizer != "byte":
        raise UserError(
            f"model.base.tool_fraction={base.tool_fraction} is not supported with "
            f"model.base.tokenizer={base.tokenizer}, whose characters cannot express a call of the calculator",
            remedy="set model.base.tokenizer=byte",
        )
