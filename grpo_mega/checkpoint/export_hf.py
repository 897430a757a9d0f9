"""Export of the policy in Hugging Face format: sharded safetensors, index, and the base model's config and tokenizer.

Whole tensors are streamed one bucket at a time; rank 0 writes a file when it is full. Tensors of the base model that
are not trained (multi-token-prediction layers) are copied unchanged. Exported weights are never FP8, so the
quantization entry of the config is removed. Its dtype becomes the dtype that most of the weights have. With a head that
is not tied, `tie_word_embeddings` is false. The folder is written under a temporary name and renamed at the end.
Asserted by tests/e2e/test_quickstart.py (`transformers` loads it with the same log-probs) and
tests/unit/checkpoint/test_export_hf.py.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from grpo_mega.formats.safetensors_reader import HfFiles
from grpo_mega.formats.stored_head import HEAD, checkpoint_spec, untie_config
from grpo_mega.interfaces import Policy
from grpo_mega.models.config_fields import with_dtype
from grpo_mega.models.parameter_tables import hf_shapes_aside
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.types import TensorSlice

MAX_SHARD_BYTES = 5 * 1000**3
_BUCKET_BYTES = 256 * 1024 * 1024
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def export_hf(policy: Policy, base: Path, folder: Path, ranks: Ranks, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Replace `folder` by the policy's current weights and the other files of `base`. Collective."""
    writer = _ShardWriter(folder.with_name(folder.name + ".tmp"), max_shard_bytes) if ranks.is_first else None
    for name, tensor in policy.full_tensors(_BUCKET_BYTES):
        if writer is not None:
            writer.add(name, tensor)
    if writer is not None:
        for name, tensor in _untrained(base):
            writer.add(name, tensor)
        writer.finish(base, folder)
    dist.barrier()


def _untrained(base: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the base model that the policy does not hold."""
    shapes = hf_shapes_aside(checkpoint_spec(base))
    if not shapes:
        return
    files = HfFiles(base)
    for name, shape in shapes.items():
        if name in files.shapes:
            yield name, files.read(TensorSlice(name, (0,) * len(shape), shape))
    files.close()


class _ShardWriter:
    """Writes tensors to safetensors files of at most `max_shard_bytes`."""

    def __init__(self, staging: Path, max_shard_bytes: int) -> None:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        self._staging, self._limit = staging, max_shard_bytes
        self._open: dict[str, Tensor] = {}
        self._files: list[list[str]] = []
        self._total_bytes = 0
        self._elements: Counter[torch.dtype] = Counter()

    def add(self, name: str, tensor: Tensor) -> None:
        if self._open and sum(t.nbytes for t in self._open.values()) + tensor.nbytes > self._limit:
            self._flush()
        self._open[name] = tensor.to("cpu", copy=True)  # the next bucket overwrites this one
        self._total_bytes += tensor.nbytes
        self._elements[tensor.dtype] += tensor.numel()

    def finish(self, base: Path, folder: Path) -> None:
        self._flush()
        count = len(self._files)
        names = ["model.safetensors"] if count == 1 else []
        names = names or [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        for i, name in enumerate(names):
            (self._staging / f"{i}.part").rename(self._staging / name)
        if count > 1:
            weight_map = {t: file for file, tensors in zip(names, self._files, strict=True) for t in tensors}
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            (self._staging / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        for path in base.iterdir():
            if path.is_file() and path.suffix not in _WEIGHT_FILES and not path.name.endswith(".index.json"):
                shutil.copy2(path, self._staging)
        _describe_weights(self._staging / "config.json", self._elements.most_common(1)[0][0])
        if any(HEAD in tensors for tensors in self._files):
            untie_config(self._staging / "config.json")
        shutil.rmtree(folder, ignore_errors=True)
        self._staging.rename(folder)

    def _flush(self) -> None:
        save_file(self._open, str(self._staging / f"{len(self._files)}.part"), metadata={"format": "pt"})
        self._files.append(list(self._open))
        self._open = {}


def _describe_weights(config: Path, dtype: torch.dtype) -> None:
    """Write the dtype of the weights to config.json and remove its quantization entry."""
    raw = json.loads(config.read_text())
    wanted = with_dtype(raw, str(dtype).removeprefix("torch."))
    wanted.pop("quantization_config", None)
    if wanted != raw:
        config.write_text(json.dumps(wanted, indent=2))
