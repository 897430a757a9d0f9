"""A `torch_dist` checkpoint seen as the Hugging Face tensors that it holds, whatever layout saved it."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import torch
import yaml
from torch import Tensor

from grpo_mega.formats.byte_ranges import Shape
from grpo_mega.formats.megatron_keys import MegatronTensor, megatron_tensors
from grpo_mega.formats.planned_files import CopyPiece, pieces_within
from grpo_mega.formats.safetensors_headers import INDEX, SINGLE
from grpo_mega.formats.safetensors_reader import WEIGHT_DTYPES, HfFiles
from grpo_mega.formats.torch_dist_reader import TorchDistFiles
from grpo_mega.models.config_readers import read_spec
from grpo_mega.models.parameter_tables import hf_shapes, hf_shapes_aside
from grpo_mega.types import TensorSlice, UserError

HF_SIDE = "hf"  # beside a converted checkpoint: config and tokenizer
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


class DistAsHf:
    """The tensors by Hugging Face's names."""

    def __init__(self, folder: Path, base: Path) -> None:
        """`folder` holds `.metadata`; `base` says by its config.json what model it is.

        What a run never had, the multi-token-prediction layers, is what it is in `base`, where that holds weights.

        Raises:
            UserError: damaged, a tensor of the model is missing, left over, or of another shape.
        """
        spec = read_spec(base)
        self.folder, self._files = folder, TorchDistFiles(folder)
        self._sources: dict[str, list[CopyPiece]] = defaultdict(list)
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
                # within the Hugging Face tensor, its box is where the piece of the key lies
                self._sources[placed.hf.name].append(CopyPiece(there, (0,) * len(ones) + placed.hf.offsets))
        self._check_left_over(known, tied=spec.tie_embeddings)
        self._aside = _weights_of(base) if shapes_aside.keys() - self._sources.keys() else None
        held = set(self._sources)
        if self._aside is not None:
            self._aside.check({}, shapes | shapes_aside)
            held |= self._aside.stored.keys()
        self.shapes = shapes | {name: shape for name, shape in shapes_aside.items() if name in held}

    def close(self) -> None:
        """Afterwards nothing can be read."""
        self._files.close()
        if self._aside is not None:
            self._aside.close()

    def dtype(self, name: str) -> torch.dtype:
        """As it was saved."""
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
        """The key and the leading coordinates under which the checkpoint has it: layers in one tensor, or apart. None:
        it may be missing."""
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
            f"{self.folder}: holds no {tensor.key} of shape {(*tensor.leading_sizes, *tensor.shape)}, which"
            f" {', '.join(names[:3])} are made of",
            remedy="is config.json of this model?",
        )

    def _check_shape(self, key: str, expected: Shape) -> None:
        found = self._files.tensors[key]
        padded = key in _VOCABULARY and found.shape[1:] == expected[1:] and found.shape[0] >= expected[0]
        if found.shape != expected and not padded:
            raise UserError(
                f"{self.folder}: {key} has shape {found.shape}, config.json says {expected}",
                remedy="is it of this model?",
            )
        if found.dtype not in WEIGHT_DTYPES:
            raise UserError(
                f"{self.folder}: {key} of shape {found.shape} has dtype {found.dtype}, a weight of shape {expected} is"
                " float32, bfloat16 or float16",
                remedy="is it a checkpoint of this model?",
            )

    def _check_left_over(self, known: set[str], *, tied: bool) -> None:
        mine = (k for k in self._files.tensors if k.startswith(("embedding.", "decoder.", "output_layer.", "mtp.")))
        left = sorted(set(mine) - known - ({"output_layer.weight"} if tied else set()))
        if left:
            told = ", ".join(f"{key} of shape {self._files.tensors[key].shape}" for key in left[:3])
            raise UserError(
                f"{self.folder}: holds {told}, no part of the model", remedy="is config.json of this model?"
            )


def _weights_of(base: Path) -> HfFiles | None:
    return HfFiles(base, "--base") if (base / SINGLE).is_file() or (base / INDEX).is_file() else None


def find_base(checkpoint: Path, folder: Path) -> Path:
    """The folder with the config.json of the checkpoint: beside it, the one that its run was started from, or what the
    run has exported.

    Raises:
        UserError: there is none.
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
        f"CKPT_DIR={checkpoint} does not say which model it is", remedy="name its Hugging Face folder by --base"
    )


def _model_of(run_config: Path) -> Path | None:
    try:
        return Path(yaml.safe_load(run_config.read_text())["model"]["path"])
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError):  # the config of something else
        return None
