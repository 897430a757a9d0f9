"""All checks, in order: `examine` for tools/doctor.py, `examine_start` and `examine_server` for the start.

`examine_start` leaves out what grpo_mega/train.py checks itself: layout, rewards, data and tokenizer.
"""

from __future__ import annotations

import math
import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil

from grpo_mega.config.schema import Config
from grpo_mega.doctor import cuda_machine, gpus, inputs, machine
from grpo_mega.doctor.finding import Finding, passed, tried
from grpo_mega.doctor.prompt_example import check_prompt
from grpo_mega.parallel.devices import num_driver_gpus
from grpo_mega.parallel.topology import Topology

_BYTES = {"fp32": 4, "bf16": 2}


def examine_machine(
    env: Mapping[str, str] = os.environ, config: Config | None = None, topology: Topology | None = None
) -> list[Finding]:
    """Check this machine: versions, GPUs, libraries, environment variables, open files and shared memory.

    Args:
        env: environment variables.
        config: of the job; None: a job of one rank with vLLM.
        topology: the layout of the job; None leaves out the rules that depend on it.
    """
    on_cuda = num_driver_gpus() > 0
    kind = "vllm" if config is None else config.engine.kind
    world_size = 1 if topology is None else topology.world_size
    num_ranks = int(env.get("LOCAL_WORLD_SIZE", str(world_size))) if topology is not None else 1
    modules = "auto" if config is None else config.policy.modules
    found = machine.check_versions(on_cuda=on_cuda, engine_kind=kind, modules=modules)
    found += gpus.check_gpus(num_ranks, one_each="SLURM_PROCID" in env)
    if on_cuda:
        transport = "auto" if config is None else config.weight_sync.transport
        found += cuda_machine.check_cuda(cuda_machine.read_facts(env), env, topology, kind, transport)
    found += machine.check_environment(
        env,
        on_cuda=on_cuda,
        num_nodes=max(1, world_size // num_ranks),
        interfaces=frozenset(psutil.net_if_addrs()),
        has_infiniband=Path("/sys/class/infiniband").is_dir(),
    )
    if topology is not None:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        limit = sys.maxsize if soft == resource.RLIM_INFINITY else soft
        with_vllm = kind == "vllm" and topology.engine_servers == 0
        found.append(machine.check_open_files(topology, limit, on_cuda=on_cuda, with_vllm=with_vllm))
    return [*found, machine.check_shared_memory()]


def examine_start(config: Config, topology: Topology, env: Mapping[str, str] = os.environ) -> list[Finding]:
    """Check machine, memory, disk and checkpoint headers.

    The first rank of every machine does this before the process groups are created.
    """
    local = int(env.get("LOCAL_WORLD_SIZE", str(topology.world_size)))
    nodes = max(1, topology.world_size // local)
    found = [*examine_machine(env, config, topology), *_sizes(config, topology, nodes)]
    if config.precision.fp8 is not None and num_driver_gpus():
        found.append(gpus.check_recipe(config.precision.fp8.recipe, cuda_machine.torch_cuda()))
    if config.engine.fp8 is not None and num_driver_gpus():
        found.append(gpus.check_engine_fp8())
    if config.has_engine and config.engine.placement == "colocated" and num_driver_gpus():
        found += _engine_share(config, topology, env)
    if config.model.path is not None:
        found.append(inputs.check_weights(config.model))
    return found


def examine_server(config: Config, env: Mapping[str, str] = os.environ) -> list[Finding]:
    """Check what an engine server needs of its machine: on CUDA, the engine's share of its GPUs.

    Raises:
        UserError: `model.path` is not a folder of a supported model.
    """
    if not num_driver_gpus():
        return []
    from grpo_mega.doctor.model_rules import configured_spec

    tp = config.engine.tp
    return [gpus.check_engine_share(config, configured_spec(config), Topology(tp, engine_tp=tp), env)]


def examine(config: Config, topology: Topology, env: Mapping[str, str] = os.environ) -> list[Finding]:
    """Run all checks."""
    found = [inputs.check_layout(config, topology), inputs.check_rewards(config)]
    found += examine_start(config, topology, env)
    found += inputs.check_servers(config)
    found += [*_tokenizer(config), inputs.check_port(env)]
    return found


def _engine_share(config: Config, topology: Topology, env: Mapping[str, str]) -> list[Finding]:
    """Check the engine's share of GPU memory. A missing model folder is reported by `inputs.check_checkpoint`."""
    if config.model.path is not None and not (config.model.folder / "config.json").is_file():
        return []
    from grpo_mega.doctor.model_rules import configured_spec

    return [gpus.check_engine_share(config, configured_spec(config), topology, env)]


def _sizes(config: Config, topology: Topology, num_nodes: int) -> list[Finding]:
    """Check host memory and disk, from the number of parameters; the sizes of a tiny base are negligible."""
    if config.model.path is None or not (config.model.folder / "config.json").is_file():
        return []
    from grpo_mega.formats.stored_head import checkpoint_spec
    from grpo_mega.models.parameter_tables import hf_shapes

    parameters = sum(math.prod(shape) for shape in hf_shapes(checkpoint_spec(config.model.folder)).values())
    itemsize = _BYTES[config.precision.dtype]
    state = 8 + (4 if itemsize < 4 else 0)
    # Every data-parallel replica holds weights; without CUDA also gradients and engine weights. The optimizer state is
    # divided over all replicas.
    on_cuda = num_driver_gpus() > 0
    copies = topology.dp * topology.cp
    # servers have memory of their own
    engines = topology.num_replicas if config.has_engine and not topology.engine_servers else 0
    weights = itemsize * copies if on_cuda else (itemsize + 4) * copies + itemsize * engines
    held = parameters * (weights + state)
    return [
        machine.check_memory(held / num_nodes),
        machine.check_disk(Path(str(config.run.dir)), parameters * (itemsize + state), config.checkpoint.keep),
    ]


def _tokenizer(config: Config) -> list[Finding]:
    """Check that the tokenizer loads, then its chat template, and show the first prompt."""
    from grpo_mega.data.chat import load_tokenizer

    if config.model.base is not None:
        from grpo_mega.tiny_base.train import base_tokenizer

        template = passed("chat template", "the recipe of the tiny base makes the tokenizer")
        return [template, *check_prompt(config, base_tokenizer(config.model.base))]
    loaded = tried("tokenizer", lambda: f"{len(load_tokenizer(config.model.folder))} tokens")
    if loaded.status == "fail":
        return [loaded]
    tokenizer = load_tokenizer(config.model.folder)
    return [inputs.check_template(config, tokenizer), *check_prompt(config, tokenizer)]
