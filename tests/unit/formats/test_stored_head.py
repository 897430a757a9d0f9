"""A head that the files of a tied model hold decides whether the model is tied, as in transformers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file

from grpo_mega.formats.stored_head import checkpoint_spec, stored_head, untie_config
from grpo_mega.models.config_readers import read_spec
from grpo_mega.models.parameter_tables import hf_shapes
from tests.helpers.family_configs import raw_family_config
from tests.helpers.tiny_models import make_family_model, make_tiny_model, store_head

PACKAGE = Path(__file__).resolve().parents[3] / "grpo_mega"
Family = Literal["qwen3", "qwen2", "llama", "qwen3_moe"]


def make_model(folder: Path, family: Family, tie: bool = True) -> Path:
    if family == "qwen3_moe":
        return make_family_model(folder, raw_family_config("qwen3_moe", tie_word_embeddings=tie))
    return make_tiny_model(folder, family, tie)


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama", "qwen3_moe"])
@pytest.mark.parametrize("head", ["copy", "different"])
def test_a_model_is_tied_exactly_if_transformers_ties_it(tmp_path: Path, family: Family, head: Any) -> None:
    from transformers import AutoModelForCausalLM

    folder = store_head(make_model(tmp_path, family), head)
    assert read_spec(folder).tie_embeddings
    spec = checkpoint_spec(folder)
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert spec.tie_embeddings == (oracle.lm_head.weight is oracle.model.embed_tokens.weight) == (head == "copy")
    assert ("lm_head.weight" in hf_shapes(spec)) == (head == "different")


def test_an_untied_model_is_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = store_head(make_tiny_model(tmp_path, "qwen3", True), "different")
    for _ in range(2):
        checkpoint_spec(folder)
    (record,) = [r for r in caplog.records if r.name == "grpo_mega.formats.stored_head"]
    assert record.levelname == "WARNING"
    assert str(folder) in record.getMessage()
    assert "tie_word_embeddings=true" in record.getMessage()


def test_without_a_stored_head_and_without_files_the_config_decides(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, "qwen3", True)
    assert (stored_head(folder), checkpoint_spec(folder).tie_embeddings) == ("none", True)
    (folder / "model.safetensors").unlink()
    assert (stored_head(folder), checkpoint_spec(folder).tie_embeddings) == ("none", True)


def test_one_different_element_in_the_last_row_is_found_and_a_changed_file_is_read_again(tmp_path: Path) -> None:
    folder = store_head(make_tiny_model(tmp_path, "qwen3", True), "copy")
    assert stored_head(folder) == "copy"
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"][-1, -1] += 1e-3
    tensors["another"] = torch.zeros(1)  # another file size, whatever the resolution of its time
    save_file(tensors, path)
    assert stored_head(folder) == "different"


def test_a_head_of_another_shape_is_different(tmp_path: Path) -> None:
    folder = store_head(make_tiny_model(tmp_path, "qwen3", True), "copy")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].contiguous()
    save_file(tensors, folder / "model.safetensors")
    assert stored_head(folder) == "different"


@pytest.mark.parametrize(("before", "after"), [(True, False), (False, False), (None, None)])
def test_the_config_of_an_untied_head_says_so(tmp_path: Path, before: bool | None, after: bool | None) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"a": 1} | ({} if before is None else {"tie_word_embeddings": before})))
    untie_config(path)
    assert json.loads(path.read_text()).get("tie_word_embeddings") is after


def test_every_reader_of_a_model_folder_considers_the_stored_head() -> None:
    calls = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if re.search(r"(?<![_\w])read_spec\(", path.read_text())
    }
    # the doctor reports a config.json that contradicts the files
    assert calls == {"models/config_readers.py", "formats/stored_head.py", "doctor/inputs.py"}
