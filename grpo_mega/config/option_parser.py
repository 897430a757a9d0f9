"""Parser of command lines that names an unknown option, and the nearest known one, before it reports anything else.

Asserted by tests/unit/config/test_option_parser.py.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any

from grpo_mega.config.key_suggestions import suggest_key
from grpo_mega.config.nearest_name import nearest_name

_NEGATIVE_NUMBER = re.compile(r"-\d+|-\d*\.\d+")  # as argparse has it


class OptionParser(argparse.ArgumentParser):
    """An `ArgumentParser` that reports an unknown option first; `ArgumentParser` reports a missing argument first.

    The program exits with code 2 and one line. The line suggests an option, or an override of a config key.
    """

    config_keys: Sequence[str] = ()
    """Keys that the command line accepts as `section.key=value`."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:  # type: ignore[override]
        """Parse as `ArgumentParser` does, after the check of all options."""
        arguments = list(sys.argv[1:] if args is None else args)
        for argument in arguments[: arguments.index("--") if "--" in arguments else None]:
            option, separator, value = argument.partition("=")
            if not self._is_known(option):
                remedy = self._remedy(option, value if separator else "VALUE")
                self.exit(2, f"error: {option} is not an option of {self.prog}; {remedy}\n")
        return super().parse_known_args(arguments, namespace)

    def _is_known(self, argument: str) -> bool:
        """Return True for a known option, also abbreviated or with its value (-n5), and for what is no option."""
        known = self._option_string_actions
        if not argument.startswith("-") or argument == "-" or _NEGATIVE_NUMBER.fullmatch(argument):
            return True
        if argument.startswith("--"):
            return any(each.startswith(argument) for each in known)
        return argument[:2] in known

    def _remedy(self, option: str, value: str) -> str:
        actions = self._option_string_actions.items()
        options = [name for name, action in actions if name.startswith("--") and action.help != argparse.SUPPRESS]
        if near := nearest_name(option, options):
            return f"did you mean {near}?"
        words = option.lstrip("-").replace("-", "_")
        by_last_part = {key.rpartition(".")[2]: key for key in reversed(self.config_keys)}
        key = suggest_key(words, self.config_keys) or by_last_part.get(nearest_name(words, by_last_part) or "")
        if key is not None:
            return f"did you mean the override {key}={value}?"
        return f"its options are {', '.join(options)}"
