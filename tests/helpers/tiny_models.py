"""Tiny random models with a character tokenizer, as Hugging Face folders."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any, Literal

import torch

Family = Literal["qwen3", "qwen2", "llama"]
PAD, EOS = 0, 1
_CHARACTERS = string.digits + "+-*/= ?." + string.ascii_lowercase + string.ascii_uppercase


def make_tiny_model(
    folder: Path,
    family: Family = "qwen3",
    tie: bool = False,
    vocab: int = 20,
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Write config, fp32 weights and tokenizer of a random model to `folder`; `overrides` are keys of its config.

    2 layers, 4 heads of 32 (vLLM's CPU attention does not support smaller ones), 2 KV heads, ffn 96. The hidden size is
    128, and 64 for qwen3, so that code that derives head_dim from it fails. Every tensor is random, also norms and
    biases, so that a lost or swapped tensor changes the results. Token 0 is padding, 1 EOS, the others are single
    characters.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

    configs = {"qwen3": Qwen3Config, "qwen2": Qwen2Config, "llama": LlamaConfig}
    settings: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": 64 if family == "qwen3" else 128,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tie,
        "pad_token_id": PAD,
        "bos_token_id": None,
        "eos_token_id": EOS,
    }
    if family == "qwen3":
        settings["head_dim"] = 32
    model = AutoModelForCausalLM.from_config(configs[family](**(settings | overrides)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            center = 1.0 if "norm" in name else 0.0
            parameter.copy_(center + 0.15 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    make_char_tokenizer(folder, vocab)
    return folder


def make_family_model(folder: Path, config: dict[str, Any], seed: int = 0, router_scale: float = 0.3) -> Path:
    """Write a random fp32 model of any family to `folder`, from the fields of its config.json.

    Every tensor is random, norms, biases and routers' correction biases too. Router weights are large (`router_scale`),
    so that the choice of experts differs between tokens and does not depend on rounding.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {k: v for k, v in config.items() if k not in ("model_type", "architectures")}
    defaults = {"pad_token_id": PAD, "bos_token_id": None, "eos_token_id": EOS}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **(defaults | settings)))
    generator = torch.Generator().manual_seed(seed)
    persistent = model.state_dict().keys()
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in persistent]
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *buffers):
            center = 1.0 if "norm" in name else 0.0
            scale = router_scale if name.endswith(".gate.weight") else 0.1
            tensor.copy_(center + scale * torch.randn(tensor.shape, generator=generator))
    model.save_pretrained(folder)
    make_char_tokenizer(folder, config["vocab_size"])
    return folder


def make_char_tokenizer(folder: Path, vocab: int) -> None:
    """Return a tokenizer of `vocab` tokens: <pad>, <eos>, then one character each."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<eos>", *_CHARACTERS[: vocab - 2]]
    names += [f"<unused{i}>" for i in range(len(names), vocab)]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.save_pretrained(folder)


def store_head(folder: Path, head: Literal["copy", "different"]) -> Path:
    """Add `lm_head.weight` to the files of a tied model: a copy of the embedding, or another matrix."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in tensors, "the model must be tied"
    embedding = tensors["model.embed_tokens.weight"]
    other = 0.15 * torch.randn(embedding.shape, generator=torch.Generator().manual_seed(9))
    tensors["lm_head.weight"] = (embedding if head == "copy" else other.to(embedding)).clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
