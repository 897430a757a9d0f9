"""The choice of a model's files: config, tokenizer and safetensors at the top of the repository, and nothing else."""

from __future__ import annotations

import json

from grpo_mega.config.hub_names import HubPart
from grpo_mega.data.hub.repository import HubRepository
from grpo_mega.types import UserError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
# fmt: off
_TOKENIZER = frozenset((
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "merges.txt", "special_tokens_map.json",
    "spiece.model", "tekken.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json",
    "vocab.txt",
))
# fmt: on


def model_files(repository: HubRepository, part: HubPart) -> list[str]:
    """Return the names of the files of a part of a model. The list of shards is downloaded for it.

    Raises:
        UserError: config.json, the safetensors or one of their shards is missing.
    """
    where = f"{repository.key}={repository.name}"
    top = {name for name in repository.sizes if "/" not in name}
    if "config.json" not in top:
        raise UserError(
            f"{where}: config.json was not found in the repository at {repository.commit}",
            remedy="name a repository of a model in Hugging Face format, or another revision",
        )
    chosen = ["config.json"]
    if part == "config":
        return chosen
    chosen += sorted(top & {"generation_config.json", *_TOKENIZER})
    return chosen if part == "small" else [*chosen, *_weights(repository, where, top)]


def _weights(repository: HubRepository, where: str, top: set[str]) -> list[str]:
    if _INDEX in top:
        repository.download([_INDEX])
        try:
            index = json.loads((repository.folder / _INDEX).read_text(encoding="utf-8"))
            shards = sorted(set(index["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{where}: {_INDEX} at {repository.commit} is damaged ({error})", remedy="use another revision"
            ) from error
        if absent := [name for name in shards if name not in top]:
            raise UserError(
                f"{where}: the file {absent[0]}, which {_INDEX} names, was not found in the repository at "
                f"{repository.commit}",
                remedy="use another revision, or a complete repository",
            )
        return [_INDEX, *shards]
    if _SINGLE in top:
        return [_SINGLE]
    raise UserError(
        f"{where}: neither {_SINGLE} nor {_INDEX} was found in the repository at {repository.commit}; other formats of "
        "weights, such as pickled ones, are not downloaded",
        remedy="use a revision with safetensors, or convert the weights and give the folder",
    )
