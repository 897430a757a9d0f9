"""A `torch_dist` checkpoint of any layout, read as Hugging Face tensors."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from torch import Tensor

from grpo_mega.formats.byte_ranges import Shape
from grpo_mega.formats.checkpoint_manifest import require_undamaged
from grpo_mega.formats.megatron_keys import MegatronTensor, megatron_tensors
from grpo_mega.formats.planned_files import SliceCopy, pieces_within, rows_at_once
from grpo_mega.formats.safetensors_headers import INDEX, SINGLE
from grpo_mega.formats.safetensors_reader import WEIGHT_DTYPES, HfFiles
from grpo_mega.formats.stored_head import checkpoint_spec
from grpo_mega.formats.torch_dist_reader import TorchDistFiles
from grpo_mega.models.parameter_tables import hf_shapes, hf_shapes_aside
from grpo_mega.models.spec import ModelSpec
from grpo_mega.types import TensorSlice, UserError

HF_SIDE = "hf"
"""Folder beside a converted checkpoint, with config and tokenizer."""
_VOCABULARY = _EMBEDDING, _HEAD = ("embedding.word_embeddings.weight", "output_layer.weight")


class DistAsHf:
    """The tensors of a checkpoint by their Hugging Face names."""

    def __init__(self, folder: Path, base: Path) -> None:
        """Read the metadata of a checkpoint.

        Args:
            folder: the folder with `.metadata`.
            base: a folder with the model's config.json. If it holds weights, the multi-token-prediction layers, which a
                run does not train, are read from it.

        Raises:
            UserError: the checkpoint is damaged, or a tensor is missing, unknown, or has another shape.
        """
        require_undamaged(folder)
        self.folder, self._files = folder, TorchDistFiles(folder)
        spec = self._untied_if_stored(checkpoint_spec(base))
        self._sources: dict[str, list[SliceCopy]] = defaultdict(list)
        shapes, shapes_aside = hf_shapes(spec), hf_shapes_aside(spec)
        known: set[str] = set()
        for tensor in megatron_tensors(spec):
            found = self._find(tensor)
            if found is None:
                continue
            key, leading = found
            known |= {key, *tensor.also}
            for placed in tensor.placements:
                ones = (1,) * len(leading)
                there = TensorSlice(key, (*leading, *placed.local.offsets), (*ones, *placed.local.shape))
                # offsets in the Hugging Face tensor, with one leading dimension for each of the key's
                self._sources[placed.hf.name].append(SliceCopy(there, (0,) * len(ones) + placed.hf.offsets))
        self._check_unknown_tensors(known | ({_HEAD} if spec.tie_embeddings else set()))
        self._aside = _weights_of(base) if shapes_aside.keys() - self._sources.keys() else None
        held = set(self._sources)
        if self._aside is not None:
            self._aside.check({}, shapes | shapes_aside)
            held |= self._aside.stored.keys()
        self.shapes = shapes | {name: shape for name, shape in shapes_aside.items() if name in held}

    def _untied_if_stored(self, spec: ModelSpec) -> ModelSpec:
        """Return the spec without tying if the checkpoint holds a head that differs from the embedding."""
        files = self._files.tensors
        if not spec.tie_embeddings or _HEAD not in files or _EMBEDDING not in files:
            return spec
        shape = (spec.vocab_size, spec.hidden_size)
        for key in (_EMBEDDING, _HEAD):
            self._check_shape(key, shape)
        step = rows_at_once(shape, torch.float32)
        for row in range(0, shape[0], step):
            part = (min(step, shape[0] - row), shape[1])
            values = [torch.empty(part, dtype=files[key].dtype) for key in (_EMBEDDING, _HEAD)]
            for key, out in zip((_EMBEDDING, _HEAD), values, strict=True):
                self._files.read_into(TensorSlice(key, (row, 0), part), out)
            if not torch.equal(values[0].float(), values[1].float()):
                return replace(spec, tie_embeddings=False)
        return spec

    def close(self) -> None:
        """Close all files; nothing can be read afterwards."""
        self._files.close()
        if self._aside is not None:
            self._aside.close()

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which the tensor was saved."""
        if name not in self._sources:
            assert self._aside is not None, name
            return self._aside.dtype(name)
        return self._files.tensors[self._sources[name][0].source.name].dtype

    def read_into(self, box: TensorSlice, out: Tensor) -> None:
        """Fill `out` with the slice of a Hugging Face tensor."""
        if box.name not in self._sources:
            assert self._aside is not None, box
            self._aside.read_into(box, out)
        for piece in self._sources.get(box.name, ()):
            extra = len(piece.at) - len(box.shape)
            begin, shape = (0,) * extra + box.offsets, (1,) * extra + box.shape
            for part in pieces_within([piece], begin, shape):
                region = out[part.index[extra:]]
                self._files.read_into(part.source, region[(None,) * extra])

    def _find(self, tensor: MegatronTensor) -> tuple[str, Shape] | None:
        """Return the key and the leading offsets of a parameter, or None if it is missing and not needed.

        The layers are stacked in one tensor, or each layer has its own key.
        """
        candidates = [(key, tensor.leading, tensor.leading_sizes) for key in (tensor.key, *tensor.also)]
        if tensor.leading:
            apart = [
                (key.replace("decoder.layers.", f"decoder.layers.{at[0]}.", 1), at[1:], sizes[1:])
                for key, at, sizes in candidates
            ]
            candidates += apart
        for key, leading, sizes in candidates:
            if key in self._files.tensors:
                self._check_shape(key, (*sizes, *tensor.shape))
                self._files.check(key)
                return key, leading
        if tensor.aside:
            return None
        names = sorted({p.hf.name for p in tensor.placements})
        raise UserError(
            f"{self.folder}: has no {tensor.key} of shape {(*tensor.leading_sizes, *tensor.shape)}, which"
            f" contains {', '.join(names[:3])}",
            remedy="check that config.json belongs to this model",
        )

    def _check_shape(self, key: str, expected: Shape) -> None:
        found = self._files.tensors[key]
        padded = key in _VOCABULARY and found.shape[1:] == expected[1:] and found.shape[0] >= expected[0]
        if found.shape != expected and not padded:
            raise UserError(
                f"{self.folder}: {key} has shape {found.shape}, config.json says {expected}",
                remedy="check that the checkpoint belongs to this model",
            )
        if found.dtype not in WEIGHT_DTYPES:
            raise UserError(
                f"{self.folder}: {key} of shape {found.shape} has dtype {found.dtype}, a weight of shape {expected} is"
                " float32, bfloat16 or float16",
                remedy="check that the checkpoint belongs to this model",
            )

    def _check_unknown_tensors(self, known: set[str]) -> None:
        model_keys = (
            k for k in self._files.tensors if k.startswith(("embedding.", "decoder.", "output_layer.", "mtp."))
        )
        left = sorted(set(model_keys) - known)
        if left:
            listed = ", ".join(f"{key} of shape {self._files.tensors[key].shape}" for key in left[:3])
            raise UserError(
                f"{self.folder}: holds {listed}, which is not part of the model",
                remedy="check that config.json belongs to this model",
            )


def _weights_of(base: Path) -> HfFiles | None:
    return HfFiles(base, "--base") if (base / SINGLE).is_file() or (base / INDEX).is_file() else None


def find_base(checkpoint: Path, folder: Path) -> Path:
    """Return the folder with the config.json of a checkpoint.

    It is the folder beside the checkpoint, the model folder of its run, or the exported model of its run.

    Raises:
        UserError: no such folder was found.
    """
    for near in (checkpoint / HF_SIDE, folder.parent / HF_SIDE):
        if (near / "config.json").is_file():
            return near
    run = folder.absolute().parent.parent  # of RUN/checkpoints/step_000020
    if (run / "config.yaml").is_file():
        for path in (_model_of(run / "config.yaml"), run / HF_SIDE):
            if path is not None and (path / "config.json").is_file():
                return path
    raise UserError(
        f"CKPT_DIR={checkpoint} does not say which model it is", remedy="set --base to its Hugging Face folder"
    )


def _model_of(run_config: Path) -> Path | None:
    try:
        return Path(yaml.safe_load(run_config.read_text())["model"]["path"])
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError):  # not the config of a run
        return None
