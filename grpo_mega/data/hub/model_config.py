"""The config.json of a model for plans, which need no weights."""

from __future__ import annotations

from pathlib import Path

from grpo_mega.config.schema import Config
from grpo_mega.config.shipped import shipped_model_folder
from grpo_mega.data.hub.fetch import fetch_model


def planned_model_folder(config: Config) -> Path:
    """Return a folder with the config.json of `model.path`: the folder itself, a shipped one, or that of the hub.

    Raises:
        UserError: the hub has no such model, denies access, or does not answer.
    """
    path = Path(str(config.model.path))
    shipped = shipped_model_folder(path)
    if shipped != path or not config.model.is_on_hub:
        return shipped
    return fetch_model(config.model, "config").folder
