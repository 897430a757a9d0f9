"""Measure pass@1, pass@k, maj@k and the mean length of a checkpoint on held-out prompts, sampled with the engine.

    grpo-mega evaluate CHECKPOINT [--data FILE] [--k 1 4 16] [section.key=value ...]
    python tools/evaluate.py CHECKPOINT [--data FILE] [--k 1 4 16] [section.key=value ...]

CHECKPOINT is a run folder (its newest checkpoint is used), a checkpoint of a run, a Hugging Face folder, or a
checkpoint that tools/hf_to_megatron.py wrote. For a checkpoint of a run, everything comes from the run: held-out sets,
seed, samples, temperature, rewards, number and layout of the engine replicas. Its last checkpoint gives the numbers of
the run's last evaluation; a line on stderr names what an option or an override changes. For all others --data is
required, and the rest has its defaults, with --reward gsm8k. Overrides are those of a run: `engine.tp=2`,
`data.template=plain`, `run.world_size=4` (the engine replicas divide the prompts).

Exit code 0: done; 1: a rank failed; 2: the input is wrong.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from grpo_mega.cli.exit_codes import errors_as_exit_codes
from grpo_mega.config.absolute_paths import with_absolute_paths
from grpo_mega.config.load import config_from_values, resolved
from grpo_mega.config.model_sections import ModelConfig
from grpo_mega.config.option_parser import OptionParser
from grpo_mega.config.sampling_options import EVALUATION_ONLY
from grpo_mega.config.schema import Config
from grpo_mega.data.hub.fetch import fetch_model, with_hub_inputs
from grpo_mega.doctor.model_rules import check_model
from grpo_mega.launch.node import Node
from grpo_mega.launch.supervisor import run_ranks
from grpo_mega.observe.run_folder import RunFolder
from grpo_mega.observe.summary import read_summary
from grpo_mega.parallel.devices import num_visible_gpus
from grpo_mega.parallel.topology import Topology
from grpo_mega.rewards.base import build_rewards
from grpo_mega.types import UserError


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint to evaluate.

    `weights` is the folder of its weights. `values` is the config of the run, or a generated one outside of runs.
    `model` is the folder of config.json and tokenizer; None: the tiny base of the run's recipe. `run` is the folder of
    the run; None outside of runs.
    """

    weights: Path
    values: dict[str, Any]
    model: Path | None
    run: Path | None = None


class RankFailedError(RuntimeError):
    """A rank has printed its error and exited with this code."""

    def __init__(self, code: int) -> None:
        super().__init__("a rank failed; its message is above")
        self.code = code


def find_checkpoint(path: Path, reward: str | None, data: Sequence[str]) -> Checkpoint:
    """Find the checkpoint that `path` names.

    Raises:
        UserError: `path` is none of the kinds in the module docstring, or the run has no complete checkpoint.
    """
    if not path.is_dir():
        raise UserError(
            f"CHECKPOINT={path} must be a folder",
            remedy="name the folder of a run, of a checkpoint, or of a Hugging Face model",
        )
    absolute = path.absolute()
    run = absolute if (path / "config.yaml").is_file() else absolute.parent.parent
    if not (run / "config.yaml").is_file():
        return _outside_of_runs(path, reward or "gsm8k", data)
    weights = path
    if run == absolute:
        checkpoints = RunFolder(path).complete_checkpoints()
        if not checkpoints:
            raise UserError(
                f"CHECKPOINT={path}: the run has no complete checkpoint",
                remedy="wait for its first checkpoint, or name the folder of its base model",
            )
        weights = checkpoints[max(checkpoints)]
    try:
        values = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        section, _ = ModelConfig.model_validate(values["model"]), values["reward"]["terms"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise UserError(
            f"{run / 'config.yaml'} must be the config of a run ({error})", remedy="name a Hugging Face folder"
        ) from None
    exported = run / "hf"
    model = exported if (exported / "config.json").is_file() else None
    if model is None and section.path is not None:
        model = (fetch_model(section, "small") if section.is_on_hub else section).folder
    return Checkpoint(weights, values, model, run)


def _outside_of_runs(path: Path, reward: str, data: Sequence[str]) -> Checkpoint:
    if not data:
        raise UserError(f"CHECKPOINT={path} is not a run, so it has no held-out prompts", remedy="give --data FILE")
    from grpo_mega.formats.torch_dist_as_hf import find_base
    from grpo_mega.formats.torch_dist_reader import checkpoint_folder

    dist = checkpoint_folder(path)
    model = path if dist is None else find_base(path, dist)
    values = {"model": {"path": str(model)}, "data": {"train": [data_source(data[0])]}, "train": {"steps": 1}}
    return Checkpoint(path, values | {"reward": {"terms": [{"name": reward}]}}, model)


def data_source(text: str) -> dict[str, str]:
    """Return a set from `PATH` or `NAME=PATH`; rewards with `datasets` go by the name."""
    name, separator, path = text.partition("=")
    is_named = separator and not Path(text).exists() and re.fullmatch(r"[A-Za-z0-9_.-]+", name)
    return {"path": path, "name": name} if is_named else {"path": text}


def config_of(args: argparse.Namespace, checkpoint: Checkpoint) -> Config:
    """Return the config of the evaluation: that of the run, changed by options and overrides, after checking its rules.

    Raises:
        UserError: the config or an override is not valid, or the run had no evaluation and --data is missing.
    """
    values = copy.deepcopy(checkpoint.values)
    engine = {**(values.get("engine") or {}), "placement": "colocated", "urls": [], "spare_urls": []}
    seed = (values.get("run") or {}).get("seed", 0) if args.seed is None else args.seed
    run = {"world_size": _num_ranks(checkpoint), "seed": seed}
    values |= {"engine": engine, "parallel": {}, "checkpoint": {}, "run": run}
    if args.data:
        values["data"]["eval"] = [data_source(text) for text in args.data]
    elif not values["data"].get("eval"):
        raise UserError(
            f"CHECKPOINT={args.checkpoint}: its run had no held-out prompts (data.eval=null)", remedy="give --data FILE"
        )
    if args.reward:
        values["reward"]["terms"] = [{"name": args.reward}]
    evaluation = {**(values.get("evaluation") or {}), "every": None}
    if args.k is not None:
        evaluation |= {"k": args.samples or max(args.k), "report_k": sorted(set(args.k))}
    elif args.samples is not None:
        evaluation["k"] = args.samples
    given = {"max_prompts": args.max_prompts, "temperature": args.temperature, "max_tokens": args.max_tokens}
    values["evaluation"] = evaluation | {key: value for key, value in given.items() if value is not None}
    if args.max_tokens is not None:
        values["sampling"] = {**(values.get("sampling") or {}), "max_tokens": args.max_tokens}
    # no training batch is built here, so its token budget must not limit max_tokens
    values["train"]["max_tokens_per_microbatch"] = 2**31
    if checkpoint.model is not None:
        values["model"] = {"path": str(checkpoint.model)}
    config = with_hub_inputs(config_from_values(values, args.overrides, [Path.cwd()]))
    if config.engine.placement == "server":
        raise UserError(
            "engine.placement=server is not supported: this command starts its own engine",
            remedy="leave engine.placement out",
        )
    _require_gpus(config)
    return config


def _num_ranks(checkpoint: Checkpoint) -> int:
    """Return the number of ranks that sample as the run did: seeds depend on the number of engine replicas."""
    engine = checkpoint.values.get("engine") or {}
    size = int(engine.get("tp", 1) * engine.get("dp", 1))
    if engine.get("placement") == "server":
        return size * len(engine["urls"])
    summary = RunFolder(checkpoint.run).summary if checkpoint.run is not None else None
    if summary is None or not summary.is_file():
        return size
    return int(read_summary(summary).layout.get("world_size", size))


def _require_gpus(config: Config) -> None:
    ranks, gpus = config.run.world_size or 1, num_visible_gpus(os.environ)
    replica = config.engine.tp * config.engine.dp
    if 0 < gpus < ranks:
        raise UserError(
            f"run.world_size={ranks} as in the run, but this machine has {gpus} GPU(s)",
            remedy=f"add run.world_size={max(1, gpus // replica) * replica}; other samples are drawn then",
        )


_COMPARED = ("run.seed", "run.world_size", "engine.*", "sampling.*", "data.*", "reward.*", "environment*",
             "evaluation.*", "precision.*")  # fmt: skip
_NOT_COMPARED = ("data.train", "evaluation.every", "engine.placement", "engine.urls", "engine.spare_urls")


def differences(config: Config, checkpoint: Checkpoint) -> list[str]:
    """Return `key=value (run: value)` for every key on which the numbers depend and in which the run differs."""
    theirs = copy.deepcopy(checkpoint.values)
    theirs["run"] = {**(theirs.get("run") or {}), "world_size": _num_ranks(checkpoint)}
    theirs = with_absolute_paths(theirs, [Path.cwd()])  # those of a run that an earlier version made are relative
    before, now = _flat(Config.model_validate(theirs)), _flat(config)
    return [
        f"{key}={now.get(key)} (run: {before.get(key)})"
        for key in now | before
        if now.get(key) != before.get(key)
        and any(fnmatchcase(key, pattern) for pattern in _COMPARED)
        and key not in _NOT_COMPARED
    ]


def _flat(config: Config) -> dict[str, Any]:
    """Return the values by `section.key`; in lists of sets and rewards, only keys with a value of their own."""
    values = resolved(config)
    values["reward"]["terms"] = [term.model_dump(mode="json", exclude_defaults=True) for term in config.reward.terms]
    values["data"]["eval"] = [source.model_dump(mode="json", exclude_defaults=True) for source in config.data.eval_sets]
    sections = {name: section if isinstance(section, dict) else {"": section} for name, section in values.items()}
    return {f"{name}.{key}".rstrip("."): v for name, section in sections.items() for key, v in section.items()}


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate one checkpoint and return the object that --json prints.

    Raises:
        UserError: the input is wrong.
        RankFailedError: a rank failed; its message is on the screen.
    """
    checkpoint = find_checkpoint(args.checkpoint, args.reward, args.data)
    config = config_of(args, checkpoint)
    if checkpoint.run is not None and (changed := differences(config, checkpoint)):
        print(f"not the same evaluation as in the run: {', '.join(changed)}", file=sys.stderr)
    world = config.run.world_size or 1
    build_rewards(config.reward.terms)
    check_model(config, Topology.of(config, world))
    folder = checkpoint.model
    if folder is None:
        from grpo_mega.tiny_base.train import ensure_base

        assert config.model.base is not None, "config/rules.py: one of model.path and model.base is set"
        folder = ensure_base(config.model.base, config.data.train_sets[0].path)
    with tempfile.TemporaryDirectory(prefix="evaluate_") as work:
        job, answer = Path(work) / "job.json", Path(work) / "answer.json"
        settings = {"config": config.model_dump(mode="json"), "model": str(folder), "weights": str(checkpoint.weights)}
        job.write_text(json.dumps(settings | {"answer": str(answer)}))
        threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "PYTHONWARNINGS": "ignore"}
        threads["HF_HUB_OFFLINE"] = "1"  # all inputs are local now
        ranks = Node.of_whole_job(world).environments({**os.environ, **threads})
        code = run_ranks([sys.executable, "-m", "grpo_mega.cli.evaluate_worker", str(job)], ranks)
        if code != 0:
            raise RankFailedError(code)
        found = json.loads(answer.read_text())
    section, defaults = config.evaluation, type(config.evaluation)()
    options = {
        name: getattr(section, name) for name in EVALUATION_ONLY if getattr(section, name) != getattr(defaults, name)
    }
    sampling = {"samples": section.k, "temperature": section.temperature, "options": options}
    data = [source.path for source in config.data.eval_sets]
    return {"checkpoint": str(checkpoint.weights), "data": data, **sampling, **found}


def lines_of(found: dict[str, Any]) -> list[str]:
    """Return the result as lines of text."""
    settings = [f"temperature {found['temperature']:g}", *(f"{key} {value}" for key, value in found["options"].items())]
    lines = [f"{found['checkpoint']}: {found['samples']} samples at {', '.join(settings)}"]
    for name, part in ({"all": found} | found["sets"] if found["sets"] else {"": found}).items():
        label = f"{name}: " if name else ""
        lines.append(f"  {label}{part['num_prompts']} prompts, pass@1 {part['accuracy']:.4f}, greedy "
                     f"{part['greedy_accuracy']:.4f}, mean length {part['length_mean']:.1f} tokens")  # fmt: skip
        for k, value in part["pass_at_k"].items():
            lines.append(f"    pass@{k} {value:.4f}   maj@{k} {part['majority_at_k'][k]:.4f}")
    return lines


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the arguments of the command line."""
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder of a run, of a checkpoint or of a Hugging Face model")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        help="any path of data.eval, or NAME=PATH; may be repeated (default: data.eval of the run)",
    )
    parser.add_argument(
        "--k", type=int, nargs="+", help="values of k of pass@k and maj@k (default: as in the run, or 4)"
    )
    parser.add_argument(
        "--samples",
        type=int,
        help="answers per prompt (default: as in the run, or the largest k)",
    )
    parser.add_argument("--temperature", type=float, help="default: the temperature of the run's evaluations, or 1")
    parser.add_argument("--max-tokens", type=int, help="longest answer in tokens (default: that of the run, or 256)")
    parser.add_argument(
        "--max-prompts", type=int, help="only the first prompts of each set (default: as in the run, or all)"
    )
    parser.add_argument("--reward", help="reward that grades the answers (default: that of the run, or gsm8k)")
    parser.add_argument("--seed", type=int, help="seed of the sampling (default: that of the run, or 0)")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object on the last line")
    return parser.parse_intermixed_args(argv)


@errors_as_exit_codes(RankFailedError)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    args = parse_arguments(argv)
    try:
        found = evaluate(args)
    except RankFailedError as error:
        if error.code == 2:  # wrong input, which the rank has reported
            return 2
        raise
    print(json.dumps(found) if args.json else "\n".join(lines_of(found)))
    return 0
