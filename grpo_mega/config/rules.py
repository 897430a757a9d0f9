"""Rules between keys, checked before anything is started. Each is one small function; a broken one is a `UserError`.

Rules that need the model's own config are in grpo_mega/doctor/model_rules.py.
"""

from __future__ import annotations

import math

from grpo_mega.config.algorithm_rules import check_algorithm
from grpo_mega.config.data_rules import check_data
from grpo_mega.config.fp8_rules import check_fp8
from grpo_mega.config.schema import Config
from grpo_mega.types import UserError


def check(config: Config) -> None:
    """Raises UserError for the first broken rule."""
    for rule in (
        _one_model,
        _group_size,
        _layout_divides,
        _pipeline,
        _recompute,
        _overlap,
        _servers,
        _engine_divides,
        _sglang,
        _engine_fp8,
        _sequence_parallel,
        _row_holds_a_rollout,
        _minibatches,
        _learning_rate,
        _evaluation,
        _rewards,
        _shuffle,
        _environment,
        _base,
    ):
        rule(config)
    check_data(config.data)
    check_algorithm(config.algorithm)
    check_fp8(config)


def _one_model(config: Config) -> None:
    if (config.model.path is None) == (config.model.base is None):
        raise UserError("model: set exactly one of model.path (a Hugging Face folder) and model.base (a tiny recipe)")


def _group_size(config: Config) -> None:
    size = config.sampling.group_size
    if size < 1:
        raise UserError(f"sampling.group_size={size}: a prompt needs an answer", remedy="use 1 or more")
    if size < 2 and config.algorithm.advantage not in ("batch", "gae"):
        raise UserError(f"sampling.group_size={size}: an advantage is relative to its group", remedy="use 2 or more")


def _layout_divides(config: Config) -> None:
    world, parallel = config.run.world_size, config.parallel
    if world is not None:
        require_whole_grids(world, tp=parallel.tp, cp=parallel.cp, pp=parallel.pp, ep=parallel.ep, etp=parallel.etp)


def require_whole_grids(world: int, *, tp: int, cp: int, pp: int, ep: int, etp: int) -> None:
    """The ranks are whole replicas of the dense layers, and whole replicas of the experts.

    Raises:
        UserError: with the numbers of ranks that would do.
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
                    f"parallel.{key}={got} does nothing with parallel.pp=1", remedy="raise pp or leave it out"
                )
        if parallel.vpp > 1:
            raise UserError(
                f"parallel.vpp={parallel.vpp} needs a pipeline", remedy="raise parallel.pp=1 or leave vpp out"
            )
    uneven = parallel.num_layers_first_stage is not None or parallel.num_layers_last_stage is not None
    if parallel.pipeline_layout is not None and uneven:
        raise UserError(
            f"parallel.pipeline_layout={parallel.pipeline_layout} says already how many layers each stage has",
            remedy="leave parallel.num_layers_first_stage and parallel.num_layers_last_stage out",
        )


def _recompute(config: Config) -> None:
    parallel = config.parallel
    if parallel.recompute_modules is not None and parallel.recompute != "selective":
        raise UserError(
            f"parallel.recompute_modules does nothing with parallel.recompute={parallel.recompute}",
            remedy="use selective, or leave the modules out",
        )
    if parallel.recompute_modules == ():
        raise UserError(
            "parallel.recompute_modules=[] recomputes nothing", remedy="name a module, or use recompute=none"
        )


def _overlap(config: Config) -> None:
    if config.parallel.overlap_param_gather and not config.parallel.overlap_grad_reduce:
        raise UserError(
            "parallel.overlap_param_gather=true needs parallel.overlap_grad_reduce=true (Megatron gathers at the "
            "buckets that it reduced)",
            remedy="set both or none",
        )


def _servers(config: Config) -> None:
    engine, world = config.engine, config.run.world_size
    if engine.placement == "colocated":
        if engine.urls:
            raise UserError(
                f"engine.urls={list(engine.urls)} does nothing with engine.placement=colocated",
                remedy="set engine.placement=server, or leave it out",
            )
        return
    if engine.kind != "vllm":
        raise UserError(
            f"engine.placement=server with engine.kind={engine.kind}, which runs beside the ranks only",
            remedy="use engine.kind=vllm, or engine.placement=colocated",
        )
    if engine.dp > 1:
        raise UserError(
            f"engine.dp={engine.dp} with engine.placement=server: a server's ranks sample the same rollouts",
            remedy="use engine.dp=1, and a server for each share of the prompts",
        )
    if not engine.urls:
        raise UserError(
            "engine.placement=server without engine.urls",
            remedy="start launch/serve.sh with this config on other devices, and "
            "list the addresses that it prints: engine.urls=[host:port, ...]",
        )
    if len(set(engine.urls)) < len(engine.urls):
        raise UserError(f"engine.urls={list(engine.urls)} names a server twice", remedy="a server is one replica")
    if world is not None:
        require_equal_parts(world, len(engine.urls))


def require_equal_parts(world: int, num_servers: int) -> None:
    """Raises UserError: the ranks cannot be cut into as many equal parts as there are servers."""
    if world % num_servers:
        raise UserError(
            f"engine.urls names {num_servers} servers, which do not divide the {world} rank(s) of this job: each "
            f"serves an equal part of them",
            remedy=f"use a number of servers that divides {world}",
        )


def _engine_divides(config: Config) -> None:
    engine = config.engine
    world = config.run.world_size if engine.placement == "colocated" else None
    ranks, keys = engine.tp, f"engine.tp={engine.tp}"
    if engine.dp > 1:
        ranks, keys = engine.tp * engine.dp, f"engine.tp x engine.dp = {engine.tp} x {engine.dp}"
    if world is not None and world % ranks:
        raise UserError(f"run.world_size={world} is not a multiple of {keys}", remedy="use one that is")
    if engine.ep not in (1, ranks):
        raise UserError(
            f"engine.ep={engine.ep}: experts are spread over all ranks of an engine or not at all",
            remedy=f"use 1 or {keys}",
        )


def _sglang(config: Config) -> None:
    if config.engine.kind == "sglang" and config.engine.dp > 1:
        raise UserError(
            f"engine.dp={config.engine.dp} with engine.kind=sglang, whose copies of the attention would share no "
            "experts",
            remedy="use engine.dp=1: every engine.tp ranks are a replica",
        )


def _engine_fp8(config: Config) -> None:
    if config.engine.fp8 is None:
        return
    if config.engine.kind != "vllm":
        raise UserError(
            f"engine.fp8={config.engine.fp8} with engine.kind={config.engine.kind}: which of its kernels read codes as "
            "they are stored is not known",
            remedy="use engine.kind=vllm, or leave engine.fp8 out",
        )
    if config.precision.dtype != "bf16":
        raise UserError(
            f"engine.fp8={config.engine.fp8} needs precision.dtype=bf16, not {config.precision.dtype}: what is not FP8 "
            "is bf16",
            remedy="set it",
        )


def _sequence_parallel(config: Config) -> None:
    if config.parallel.sequence_parallel and config.parallel.tp == 1:
        raise UserError(
            "parallel.sequence_parallel=true does nothing with parallel.tp=1", remedy="raise tp or leave it out"
        )


def _row_holds_a_rollout(config: Config) -> None:
    parallel = config.parallel
    longest = config.longest_training_rollout
    chunks = 2 * parallel.cp * (parallel.tp if parallel.sequence_parallel else 1) if parallel.cp > 1 else 1
    padded = -(-longest // chunks) * chunks
    if config.train.max_tokens_per_microbatch < padded:
        why = f" (to a multiple of {chunks} with parallel.cp={parallel.cp})" if chunks > 1 else ""
        raise UserError(
            f"train.max_tokens_per_microbatch={config.train.max_tokens_per_microbatch} is less than "
            f"data.max_prompt_tokens + sampling.max_tokens = {longest}{why}",
            remedy=f"raise it to {padded} or more",
        )


def _minibatches(config: Config) -> None:
    if config.train.minibatches_per_epoch > config.data.prompts_per_step:
        raise UserError(
            f"train.minibatches_per_epoch={config.train.minibatches_per_epoch} is more than "
            f"data.prompts_per_step={config.data.prompts_per_step}",
            remedy="minibatches hold whole groups",
        )


def _learning_rate(config: Config) -> None:
    optimizer, train = config.optimizer, config.train
    decay = optimizer.decay_updates
    if decay is None:
        if optimizer.min_lr > 0:
            raise UserError(
                f"optimizer.min_lr={optimizer.min_lr} does nothing without optimizer.decay_updates", remedy="set it"
            )
        return
    if decay <= optimizer.warmup_updates:
        raise UserError(
            f"optimizer.decay_updates={decay} is not more than optimizer.warmup_updates={optimizer.warmup_updates}",
            remedy="it counts from the first update",
        )
    updates = train.steps * train.epochs_per_rollout * train.minibatches_per_epoch
    if updates > decay and optimizer.min_lr == 0:
        raise UserError(
            f"optimizer.decay_updates={decay}: the last {updates - decay} of {updates} updates would have a learning "
            "rate of 0",
            remedy="raise decay_updates, or set optimizer.min_lr",
        )


def _evaluation(config: Config) -> None:
    evaluation = config.evaluation
    if evaluation.every is not None and config.data.eval is None:
        raise UserError(f"evaluation.every={evaluation.every} does nothing without data.eval", remedy="set data.eval")
    wrong = [k for k in evaluation.report_k or () if not 1 <= k <= evaluation.k]
    if wrong:
        raise UserError(
            f"evaluation.report_k: {wrong[0]} of evaluation.k={evaluation.k} samples",
            remedy=f"use numbers from 1 to {evaluation.k}, or raise evaluation.k",
        )


def _rewards(config: Config) -> None:
    if not config.reward.terms:
        raise UserError("reward.terms is empty", remedy="name at least one reward, for example {name: exact}")


def _shuffle(config: Config) -> None:
    if config.reward.shuffle and config.algorithm.advantage == "process":
        raise UserError(
            "reward.shuffle=true with algorithm.advantage=process: steps belong to their rollout",
            remedy="use another advantage",
        )


def _environment(config: Config) -> None:
    environment = config.environment
    if environment is not None and any(not text for text in environment.stop or ()):
        raise UserError(
            "environment.stop holds an empty text, which would end every answer at once", remedy="leave it out"
        )


def _base(config: Config) -> None:
    base = config.model.base
    if base is None or not base.tool_fraction:
        return
    if base.tokenizer != "byte":
        raise UserError(
            f"model.base.tool_fraction={base.tool_fraction} with model.base.tokenizer={base.tokenizer}, which cannot "
            "write a call of the calculator",
            remedy="use model.base.tokenizer=byte",
        )
