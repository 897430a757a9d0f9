"""Records vLLM's loader on the models that vLLM builds for a job, by a load format of this program.

Asserted by tests/engine/test_vllm_record.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn

from grpo_mega.engines.weights.loader_recording import (
    CannotRecordError,
    LoaderRecord,
    Shape,
    UnfilledError,
    record_loader,
)

RECORDING = "grpo_mega_recording"  # the load format


def record_vllm(model: nn.Module, tensors: Mapping[str, tuple[Shape, torch.dtype]]) -> LoaderRecord:
    """Record the loader of a vLLM model; see `record_loader`.

    Raises:
        CannotRecordError: the loader does something other than copying slices.
        UnfilledError: a parameter is not filled by the tensors of the checkpoint.
    """
    return record_loader(model, tensors, vocabulary_parameters(model), preset=cache_scales(model))


def cache_scales(model: nn.Module) -> set[str]:
    """Return the scales of the KV cache, which are parameters of an FP8 model.

    Where the checkpoint has none, vLLM sets them to 1 after loading (layers/quantization/kv_cache.py).
    """
    names = ("q_scale", "k_scale", "v_scale", "prob_scale")
    return {name for name, p in model.named_parameters() if p.dim() == 0 and name.rpartition(".")[2] in names}


def recording_load_format(
    tensors: Mapping[str, tuple[Shape, torch.dtype]],
    loaded: Callable[[nn.Module, Any], None] | None = None,
) -> list[LoaderRecord | str]:
    """Register the load format RECORDING with vLLM: random weights, as its `dummy` format, and the loader recorded.

    Args:
        tensors: name -> (shape, dtype) of every tensor of the checkpoint.
        loaded: called with each model once it is complete, and with vLLM's config.

    Returns:
        A list to which each load appends its record, or the reason why its loader cannot be recorded. A load raises
        RuntimeError if the tensors leave a parameter unfilled: streaming whole tensors would leave it unfilled too.
    """
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    records: list[LoaderRecord | str] = []

    class RecordingLoader(DummyModelLoader):
        def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> nn.Module:
            model: nn.Module = super().load_model(vllm_config, model_config, prefix)
            if loaded is not None:
                loaded(model, vllm_config)
            return model

        def load_weights(self, model: nn.Module, model_config: Any) -> None:
            super().load_weights(model, model_config)
            try:
                records.append(record_vllm(model, tensors))
            except UnfilledError as error:
                raise RuntimeError(f"vLLM's model does not match the checkpoint: {error}") from error
            except CannotRecordError as error:
                records.append(str(error))

    register_model_loader(RECORDING)(RecordingLoader)
    return records


@contextmanager
def tied_as_configured() -> Iterator[None]:
    """Keep `tie_word_embeddings` as `hf_overrides` sets it while vLLM builds its config.

    vLLM unties a model whose files hold `lm_head.weight` (config/model.py, `maybe_untie_word_embeddings`), and ties it
    again if the loaded tensors are equal. RECORDING reads no files, as vLLM's `dummy` format, for which vLLM does not
    untie either (config/vllm.py). The program has compared the files itself (formats/stored_head.py).
    """
    from vllm.config import ModelConfig

    with mock.patch.object(ModelConfig, "maybe_untie_word_embeddings", return_value=None):
        yield


def vocabulary_parameters(model: nn.Module) -> set[str]:
    """Return parameters whose last rows may be padding: vLLM rounds the vocabulary up before it splits it."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    return {
        f"{name}.{own}"
        for name, module in model.named_modules()
        if isinstance(module, VocabParallelEmbedding)
        for own, _ in module.named_parameters(recurse=False)
    }
