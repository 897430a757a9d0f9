"""The console script `grpo-mega`: one subcommand per module of this package.

`grpo-mega plan ...` and `python tools/plan.py ...` call the same function. Modules are imported when their subcommand
is called, so `grpo-mega --help` needs neither torch nor an engine.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from grpo_mega import __version__
from grpo_mega.cli.closed_pipe import allow_closed_pipe
from grpo_mega.config.nearest_name import nearest_name


@dataclass(frozen=True)
class Command:
    """A subcommand: the module whose `main` it calls, and its line in `grpo-mega --help`."""

    module: str
    summary: str


COMMANDS = {
    "train": Command("train", "train a model: CONFIG [section.key=value ...]"),
    "serve": Command("serve", "start an engine server for jobs with engine.placement=server"),
    "plan": Command("plan", "predict memory and time per phase, and whether a run fits"),
    "plan-sync": Command("plan_sync", "compute the reshard plan of a weight sync, without a GPU"),
    "doctor": Command("doctor", "check this machine and a config before a job starts"),
    "fetch": Command("fetch", "download the models and data sets of a config from the hub"),
    "configs": Command("configs", "list or print the configs shipped with the package"),
    "convert": Command("convert", "convert checkpoints: to-megatron, to-hf"),
    "compare": Command("compare", "compare checkpoints, logits or layouts, or check a mapping"),
    "evaluate": Command("evaluate", "measure pass@1, pass@k and mean length of a checkpoint"),
    "score": Command("score", "score a file of completions with a reward"),
    "fp8-report": Command("fp8_report", "report the quantization error of a model's weights in FP8"),
    "rollouts": Command("rollouts", "print the rollouts of a step of a run"),
    "replay": Command("replay", "make a recorded step again, and name the first stage that differs"),
    "chaos": Command("chaos", "disturb small runs with signals, and check that each ends as the undisturbed run"),
    "report": Command("report", "make the HTML report of a run, or compare two runs"),
    "trace": Command("trace", "merge the traces of a run's ranks into one file for ui.perfetto.dev"),
    "watch": Command("watch", "follow a run from another terminal, read-only"),
}


def usage(commands: dict[str, Command] = COMMANDS, prog: str = "grpo-mega") -> str:
    """Return the help text: one line per subcommand."""
    width = max(map(len, commands))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in commands.items()]
    return "\n".join(
        [f"usage: {prog} COMMAND [arguments]", "", *lines, "", f"`{prog} COMMAND --help` describes a command."]
    )


def dispatch(arguments: Sequence[str], commands: dict[str, Command], prog: str) -> int:
    """Call the subcommand that the first argument names; return its exit code, or 2 for an unknown name."""
    name, rest = (arguments[0], list(arguments[1:])) if arguments else ("", [])
    if name in ("-h", "--help"):
        print(usage(commands, prog))
        return 0
    if name not in commands:
        near = nearest_name(name, commands)
        problem = f"{name!r} is not a command" if name else "a command is missing"
        hint = f"did you mean {near}?" if near else f"use one of {', '.join(commands)}"
        print(f"error: {prog}: {problem}; {hint}", file=sys.stderr)
        return 2
    sys.argv = [f"{prog} {name}", *rest]  # argparse prints the first word of it as the program's name
    module = importlib.import_module(f"grpo_mega.cli.{commands[name].module}")
    code: int = 0
    with allow_closed_pipe():
        code = module.main(rest)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--version"]:
        print(__version__)
        return 0
    return dispatch(arguments, COMMANDS, "grpo-mega")


if __name__ == "__main__":
    sys.exit(main())
