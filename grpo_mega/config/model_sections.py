"""Config section `model`: a Hugging Face folder, a model of a Hugging Face hub, or the recipe of a tiny base model that
is pre-trained locally."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from grpo_mega.config.hub_names import is_commit, is_hub_name, snapshot_folder
from grpo_mega.config.section import Section
from grpo_mega.types import UserError


class ArchitectureConfig(Section):
    """Architecture of the tiny base model, a dense Qwen3."""

    num_layers: int = Field(4, ge=1)
    """Number of transformer layers."""
    hidden_size: int = Field(128, ge=8)
    """Width of the residual stream, in elements."""
    ffn_size: int = Field(384, ge=8)
    """Width of the gated MLP, in elements."""
    num_heads: int = Field(4, ge=1)
    """Number of query heads."""
    num_kv_heads: int = Field(2, ge=1)
    """Number of key and value heads (grouped-query attention)."""
    head_dim: int = Field(32, ge=4)
    """Width of one attention head, in elements."""
    max_positions: int = Field(512, ge=16)
    """Longest sequence, in tokens."""
    tie_embeddings: bool = False
    """Use the embedding matrix as the output layer as well."""


class BaseConfig(Section):
    """Recipe of a tiny base model that is pre-trained on worked examples before the run.

    The result is cached under the digest of the recipe, so each recipe is pre-trained once.
    """

    task: Literal["arithmetic", "gsm8k"]
    """Source of the worked examples: generated arithmetic, or a file in the format of GSM8K."""
    architecture: ArchitectureConfig = ArchitectureConfig()
    """Sizes of the model."""
    tokenizer: Literal["char", "byte"] = "char"
    """Vocabulary: the characters of the task, or the 256 bytes. Tools need `byte`."""
    examples: str | None = None
    """JSONL file of worked examples for `gsm8k`, of which the first half is used. null: the first set of
    `data.train`."""
    steps: int = Field(400, ge=1)
    """Optimizer steps of pre-training."""
    batch_size: int = Field(128, ge=1)
    """Worked examples per optimizer step."""
    learning_rate: float = Field(1e-3, gt=0)
    """Learning rate of pre-training."""
    flawed_fraction: float = Field(0.5, ge=0, le=1)
    """Fraction of the worked examples that contain a mistake (arithmetic) or lack the answer format (gsm8k)."""
    tool_fraction: float = Field(0.0, ge=0, le=1)
    """Fraction of the worked examples that call the calculator. In arithmetic, these contain no mistake."""
    seed: int = Field(0, ge=0)
    """Seed of the initial weights and of the worked examples."""
    cache_dir: str = "runs/bases"
    """Folder that holds one subfolder per pre-trained recipe."""


class ModelConfig(Section):
    """Base model of the policy. Exactly one of `path` and `base` must be set."""

    path: str | None = None
    """Hugging Face folder with `config.json`, `*.safetensors` and the tokenizer, or the name of a model of the Hugging
    Face hub (`Qwen/Qwen2.5-7B-Instruct`). A folder takes precedence over a name. null: use `base`."""
    revision: str | None = None
    """Branch, tag or commit of a model of the hub. null: `main`. The resolved config holds the commit."""
    base: BaseConfig | None = None
    """Recipe of a tiny model that is pre-trained before the run. null: use `path`."""
    checkpoint: str | None = None
    """Checkpoint of a run (`RUN/checkpoints/step_NNNNNN`) whose weights replace those of `path` or `base`, for example
    of supervised fine-tuning. Policy, reference and critic start with them; optimizer, step and data start anew. null:
    none."""

    @property
    def is_on_hub(self) -> bool:
        """Return True if `path` is the name of a model of the hub."""
        return self.path is not None and is_hub_name(self.path)

    @property
    def folder(self) -> Path:
        """Return the local folder of `path`: the folder itself, or the folder of the model's commit in the cache.

        Raises:
            UserError: the commit is not known, because the model was not fetched.
        """
        assert self.path is not None, "config/rules.py: one of model.path and model.base is set"
        if not self.is_on_hub:
            return Path(self.path)
        if self.revision is None or not is_commit(self.revision):
            raise UserError(
                f"model.path={self.path} with model.revision={self.revision} is not in the cache",
                remedy="run `grpo-mega fetch CONFIG`, or give a Hugging Face model folder",
            )
        return snapshot_folder("model", self.path, self.revision)
