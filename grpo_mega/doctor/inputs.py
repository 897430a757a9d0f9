"""Checks of the user's input: layout, checkpoint headers, rewards, engine servers, chat template, port."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_mega.config.hub_names import has_model, hub_cache
from grpo_mega.config.model_sections import ModelConfig
from grpo_mega.config.schema import Config
from grpo_mega.doctor.finding import Finding, passed, tried
from grpo_mega.parallel.ports import port_is_free
from grpo_mega.parallel.topology import Topology
from grpo_mega.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from grpo_mega.engines.server.protocol import NamedServer

_QUESTION = "What is 2 + 3?"


def check_layout(config: Config, topology: Topology) -> Finding:
    """Check the rules between config and model (grpo_mega/doctor/model_rules.py)."""
    from grpo_mega.doctor.model_rules import check_model

    def check() -> str:
        check_model(config, topology)
        return f"{topology.world_size} rank(s): {topology.describe(0).partition(' | ')[2].replace(' 0/', '=')}"

    return tried("layout", check)


def check_checkpoint(folder: Path) -> Finding:
    """Check that the safetensors headers hold every tensor of the model, in the shape that config.json gives."""
    from grpo_mega.formats.safetensors_reader import HfFiles
    from grpo_mega.formats.stored_head import HEAD, checkpoint_spec, stored_head
    from grpo_mega.models.config_readers import read_spec
    from grpo_mega.models.parameter_tables import hf_shapes, hf_shapes_aside

    def check() -> str:
        spec = checkpoint_spec(folder)
        files = HfFiles(folder)
        try:
            files.check(hf_shapes(spec), hf_shapes_aside(spec))
        finally:
            files.close()
        copied = ", the head is a copy of the embedding and tied to it"
        note = copied if spec.tie_embeddings and stored_head(folder) == "copy" else ""
        return f"{len(files.stored)} tensors of {spec.family} in {folder}{note}"

    found = tried("checkpoint", check)
    if found.status == "pass" and read_spec(folder).tie_embeddings and not checkpoint_spec(folder).tie_embeddings:
        return Finding(
            "checkpoint", "warn",
            f"config.json has tie_word_embeddings=true, but {HEAD} differs from the embedding: the head is not tied, "
            "as in transformers 5",
            "set tie_word_embeddings=false in config.json, or remove the head from the files to tie it",
        )  # fmt: skip
    return found


def check_weights(model: ModelConfig) -> Finding:
    """Check the headers of the safetensors, as `check_checkpoint`; weights on a hub need not be here yet."""
    if model.is_on_hub and not has_model(str(model.path), str(model.revision), "all"):
        return Finding(
            "checkpoint", "warn", f"the weights of {model.path} at {model.revision} are not in the cache {hub_cache()}",
            "run `grpo-mega fetch CONFIG` before the job; otherwise the job downloads them when it starts",
        )  # fmt: skip
    return check_checkpoint(model.folder)


def check_rewards(config: Config) -> Finding:
    """Check that every reward term is found and can be imported."""
    from grpo_mega.rewards.base import build_rewards

    def check() -> str:
        return ", ".join(reward.name for reward in build_rewards(config.reward.terms))

    return tried("rewards", check)


def check_servers(config: Config) -> list[Finding]:
    """Check that the engine servers answer, fit this config, and serve no other job."""
    from grpo_mega.engines.server.claim import inspect_server
    from grpo_mega.engines.server.messages import differences, serving_facts
    from grpo_mega.engines.server.protocol import configured_servers, read_token

    found = []
    for server in configured_servers(config.engine):

        def check(server: NamedServer = server) -> str:
            status = inspect_server(server, read_token())
            facts = status.facts
            # a tiny base has no folder before a job has pre-trained it
            wanted = serving_facts(config, config.model.folder) if config.model.path is not None else facts
            if different := differences(wanted, facts):
                raise UserError(f"{server.url} has {', '.join(different)}", remedy="start it with this config")
            if status.job is not None:
                raise UserError(
                    f"{server.url} serves another job ({status.job})", remedy="wait for its end, or name another server"
                )
            return f"{server.url} is an engine server of version {facts.program_version}, and free"

        found.append(tried(server.key, check))
    return found


def check_template(config: Config, tokenizer: PreTrainedTokenizerBase) -> Finding:
    """Check that the chat template renders the same prompt every time and as the beginning of a longer conversation.

    Otherwise a later turn, or a resumed run, reads another prompt than the one that the engine continued.
    """
    if config.data.template == "plain":
        return passed("chat template", "data.template=plain: no chat template is used")
    from grpo_mega.data.prompt_template import PromptTemplate

    def text(*messages: tuple[str, str]) -> str:
        return template.render([{"role": role, "content": content} for role, content in messages]).text

    try:
        template = PromptTemplate(config.data, tokenizer)
        short, again = text(("user", _QUESTION)), text(("user", _QUESTION))
        longer = text(("user", _QUESTION), ("assistant", "5"), ("user", "And 3 + 4?"))
    except UserError as error:
        return Finding("chat template", "fail", error.message, error.remedy)
    except Exception as error:  # a template is a program and can raise anything
        return Finding("chat template", "fail", f"cannot be applied: {error}", "repair the chat template")
    if short != again:
        return Finding("chat template", "fail", "renders another text each time", "remove its random parts")
    if "strftime_now" in str(template.source):
        return Finding(
            "chat template", "warn", "contains today's date: a run that is resumed tomorrow trains on other prompts",
            "set data.system_prompt, or fix the date in the template",
        )  # fmt: skip
    if not longer.startswith(short):
        return Finding(
            "chat template", "warn", "the prompt of a first turn is not the beginning of the longer conversation's",
            "use one turn per prompt, or a template that does not change earlier turns",
        )  # fmt: skip
    return passed(
        "chat template", f"stable, {len(tokenizer.encode(short, add_special_tokens=False))} tokens for a short question"
    )


def check_port(env: Mapping[str, str]) -> Finding:
    """Check that the first rank can listen on MASTER_PORT, if it runs on this machine."""
    port, address = env.get("MASTER_PORT"), env.get("MASTER_ADDR", "127.0.0.1")
    if port is None:
        return passed("port", "MASTER_PORT is not set: the launcher chooses a free port")
    if not port.isdecimal() or not 0 < int(port) < 65536:
        return Finding("port", "fail", f"MASTER_PORT={port} is not a port", "use a number from 1024 to 65535")
    if address in ("127.0.0.1", "localhost") and not port_is_free(int(port)):
        return Finding("port", "fail", f"MASTER_PORT={port} is in use on this machine", "choose another port")
    return passed("port", f"{address}:{port}")
