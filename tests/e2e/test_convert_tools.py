"""Conversion in both directions is bit-equal, readable by stock Megatron, and resumable; wrong input is rejected."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from grpo_mega.cli.compare_checkpoints import main as compare_checkpoints_tool
from grpo_mega.cli.hf_to_megatron import main as hf_to_megatron_tool
from grpo_mega.cli.megatron_to_hf import main as megatron_to_hf_tool
from grpo_mega.convert.compare import TensorComparison, compare, open_checkpoint
from grpo_mega.convert.hf_to_megatron import hf_to_megatron
from grpo_mega.convert.megatron_to_hf import megatron_to_hf
from grpo_mega.formats.safetensors_reader import HfFiles
from grpo_mega.models.digest import digest_text, slice_digest
from grpo_mega.quantization import block_fp8, mxfp4
from grpo_mega.types import TensorSlice, UserError
from tests.helpers.checkpoint_checks import VOCAB, assert_same_tensors, hf_logits, read_tensors, run_stock
from tests.helpers.family_checkpoints import make_published_mxfp4
from tests.helpers.tiny_models import make_tiny_model, store_head

MODELS: dict[str, tuple[Any, bool]] = {
    "qwen3": ("qwen3", False),
    "qwen2-tied": ("qwen2", True),
    "llama": ("llama", False),
}


@pytest.fixture(scope="module")
def converted_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with NAME/hf and NAME/megatron of every model."""
    root = tmp_path_factory.mktemp("convert")
    for seed, (name, (family, tie)) in enumerate(MODELS.items()):
        make_tiny_model(root / name / "hf", family, tie, VOCAB, seed)
        hf_to_megatron(root / name / "hf", root / name / "megatron")
    return root


@pytest.mark.parametrize("name", MODELS)
def test_a_round_trip_is_bit_equal_with_index_digests_and_other_files(
    converted_models: Path, tmp_path: Path, name: str
) -> None:
    hf = converted_models / name / "hf"
    megatron_to_hf(converted_models / name / "megatron", tmp_path / "back", shard_bytes=100_000)
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 2
    assert_same_tensors(tmp_path / "back", hf)
    HfFiles(tmp_path / "back").check({n: tuple(t.shape) for n, t in read_tensors(hf).items()})
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (hf / file).read_bytes()
    digests = {
        n: digest_text(slice_digest(t, TensorSlice(n, (0,) * t.dim(), tuple(t.shape))))
        for n, t in read_tensors(hf).items()
    }
    for side in (converted_models / name / "megatron", tmp_path / "back"):
        assert json.loads((side / "digests.json").read_text()) == digests
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("name", "tp", "pp"), [pytest.param("qwen3", 2, 1, marks=pytest.mark.long), ("qwen2-tied", 1, 2)]
)
def test_a_stock_megatron_loads_it_at_another_layout_and_its_checkpoint_converts_back(
    converted_models: Path, tmp_path: Path, name: str, tp: int, pp: int
) -> None:
    config = converted_models / name / "hf" / "config.json"
    found = run_stock("load", config, converted_models / name / "megatron" / "release", tmp_path / "logits", tp, pp)
    assert float((found - hf_logits(converted_models / name / "hf")).abs().max()) <= 2e-5
    megatron_to_hf(tmp_path / "logits.again", tmp_path / "back", base=converted_models / name / "hf")
    assert_same_tensors(tmp_path / "back", converted_models / name / "hf")


@pytest.mark.parametrize("head", ["copy", "different"])
def test_a_head_that_the_files_of_a_tied_model_hold_is_kept_if_it_differs(tmp_path: Path, head: Any) -> None:
    """The logits are those of transformers at every stage; a copy is compared as the embedding that it equals."""
    hf = store_head(make_tiny_model(tmp_path / "hf", "qwen3", True, VOCAB), head)
    wanted = hf_logits(hf)
    hf_to_megatron(hf, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "again", base=hf)
    for folder in (tmp_path / "back", tmp_path / "again"):
        assert torch.equal(hf_logits(folder), wanted)
        assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is (head == "copy")
        assert ("lm_head.weight" in read_tensors(folder)) == (head == "different")
    for side in (tmp_path / "megatron", tmp_path / "back"):
        assert [each.verdict for each in compare_all(hf, side)] == ["equal"] * (25 if head == "different" else 24)


def test_a_checkpoint_with_another_head_is_not_tied_even_if_its_config_says_so(tmp_path: Path) -> None:
    hf = store_head(make_tiny_model(tmp_path / "hf", "qwen3", True, VOCAB), "different")
    hf_to_megatron(hf, tmp_path / "megatron")
    config = tmp_path / "megatron" / "hf" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert torch.equal(hf_logits(tmp_path / "back"), hf_logits(hf))


def compare_all(a: Path, b: Path) -> list[TensorComparison]:
    return list(compare(open_checkpoint(a, None, b), open_checkpoint(b, None, a)))


def test_a_checkpoint_created_by_a_stock_megatron_converts(converted_models: Path, tmp_path: Path) -> None:
    config = converted_models / "llama" / "hf" / "config.json"
    wanted = run_stock("save", config, tmp_path / "stock", tmp_path / "logits", 2, 1)
    megatron_to_hf(tmp_path / "stock", tmp_path / "hf", base=converted_models / "llama" / "hf")
    assert float((hf_logits(tmp_path / "hf") - wanted).abs().max()) <= 2e-5


def test_the_checkpoint_has_the_files_and_arguments_that_megatron_lm_expects(converted_models: Path) -> None:
    folder = converted_models / "qwen3" / "megatron"
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "release"
    names = {path.name for path in (folder / "release").iterdir()}
    assert names == {".metadata", "metadata.json", "common.pt", "__0_0.distcp"}
    args = torch.load(folder / "release" / "common.pt", weights_only=False)["args"]
    assert (args.num_layers, args.kv_channels, args.num_query_groups, args.qk_layernorm) == (2, 32, 2, True)
    assert (args.untie_embeddings_and_output_weights, args.swiglu, args.normalization) == (True, True, "RMSNorm")


def test_fp8_is_restored_bit_for_bit_and_can_be_read_as_bf16(tmp_path: Path) -> None:
    hf = make_tiny_model(tmp_path / "hf", "llama", vocab=VOCAB, intermediate_size=200)
    tensors, generator = {}, torch.Generator().manual_seed(0)
    for name, tensor in read_tensors(hf).items():
        tensors[name] = tensor.bfloat16()
        if name.endswith("_proj.weight"):
            quantized, scales = block_fp8.quantize(tensor)
            scales = scales * (1 + torch.rand(scales.shape, generator=generator))
            tensors |= {name: quantized, name + block_fp8.SCALE_SUFFIX: scales}
    save_file(tensors, hf / "model.safetensors")
    config = json.loads((hf / "config.json").read_text())
    fp8_fields = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    (hf / "config.json").write_text(json.dumps(config | fp8_fields))
    hf_to_megatron(hf, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "fp8", to_fp8=True)
    assert_same_tensors(tmp_path / "fp8", hf)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "bf16")
    name = "model.layers.1.mlp.down_proj.weight"
    values = block_fp8.dequantize(tensors[name], tensors[name + block_fp8.SCALE_SUFFIX])
    assert torch.equal(read_tensors(tmp_path / "bf16")[name], values)
    assert "quantization_config" not in json.loads((tmp_path / "bf16" / "config.json").read_text())
    texts = {(tmp_path / side / "digests.json").read_text() for side in ("megatron", "fp8", "bf16")}
    assert len(texts) == 1


def test_mxfp4_experts_become_their_dequantized_bf16_values(tmp_path: Path) -> None:
    hf = make_published_mxfp4(tmp_path / "hf", hidden_size=64, intermediate_size=96)
    tensors = read_tensors(hf)
    packed = {n.removesuffix("_blocks"): n for n in tensors if n.endswith("_blocks")}
    assert len(packed) == 4, "two weights of experts in each of two layers"
    values = {n: mxfp4.dequantize(tensors.pop(p), tensors.pop(n + "_scales")) for n, p in packed.items()}
    hf_to_megatron(hf, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "bf16")
    found = read_tensors(tmp_path / "bf16")
    assert found.keys() == tensors.keys() | values.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in (tensors | values).items())
    assert "quantization_config" not in json.loads((tmp_path / "bf16" / "config.json").read_text())
    with pytest.raises(UserError, match=r"--fp8: .*quant_method=mxfp4"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "fp8", to_fp8=True)


def die_after(num_reads: int, hf: Path, out: Path) -> None:
    """Run a conversion that exits abruptly after `num_reads` reads, as after kill -9."""
    read, left = HfFiles.read_into, iter(range(num_reads))

    def read_or_exit(self: HfFiles, box: TensorSlice, values: Tensor) -> None:
        if next(left, None) is None:
            os._exit(9)
        read(self, box, values)

    HfFiles.read_into = read_or_exit  # type: ignore[method-assign]
    hf_to_megatron(hf, out, file_bytes=60_000, workers=1)


def run_and_kill(work: Callable[..., object], *arguments: object, after: float | None = None) -> bool:
    """Run `work` in a process and kill it after `after` seconds, if given; return True if it did not finish."""
    child = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    child.start()
    child.join(after)
    child.kill()
    child.join()
    return child.exitcode != 0


def test_a_killed_conversion_continues_and_keeps_only_complete_files(converted_models: Path, tmp_path: Path) -> None:
    hf, out = converted_models / "llama" / "hf", tmp_path / "out"
    assert run_and_kill(die_after, 20, hf, out)
    assert not out.exists()
    complete = sorted((tmp_path / "out.partial/result/release").glob("*.distcp"))
    assert len(complete) >= 3
    damaged = complete[1:3]
    for path, position in zip(damaged, (path.stat().st_size // 2 for path in damaged), strict=True):
        data = bytearray(path.read_bytes())
        data[position if path is damaged[0] else 5] ^= 1  # a byte of a value, and bytes between the values
        path.write_bytes(data)
    report = hf_to_megatron(hf, out, file_bytes=60_000)
    kept = {f"release/{path.name}" for path in complete} - {f"release/{path.name}" for path in damaged}
    assert set(report.redone).isdisjoint(kept)
    assert len(report.redone) == report.num_files - len(kept)
    hf_to_megatron(hf, tmp_path / "uninterrupted", file_bytes=60_000)
    assert_same_files(out, tmp_path / "uninterrupted")
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".partial")] == []


def assert_same_files(found: Path, wanted: Path) -> None:
    left, right = ({p.relative_to(f): p for f in [side] for p in f.rglob("*")} for side in (found, wanted))
    assert left.keys() == right.keys()
    for name, path in right.items():
        assert path.is_dir() or left[name].read_bytes() == path.read_bytes(), name


def convert_slowly(convert: Callable[..., object], *arguments: Path, **options: int) -> None:
    write = os.pwrite
    os.pwrite = lambda *a: (time.sleep(0.005), write(*a))[1]  # type: ignore[assignment]
    convert(*arguments, **options)


@pytest.mark.parametrize("direction", ["to_megatron", "to_hf"])
def test_a_conversion_killed_at_random_moments_ends_with_the_same_bytes(
    converted_models: Path, tmp_path: Path, direction: str
) -> None:
    llama = converted_models / "llama"
    convert: Callable[..., object] = hf_to_megatron if direction == "to_megatron" else megatron_to_hf
    source = llama / ("hf" if direction == "to_megatron" else "megatron")
    options = {"file_bytes" if direction == "to_megatron" else "shard_bytes": 60_000, "workers": 2}
    convert(source, tmp_path / "wanted", **options)
    moments, kills = random.Random(5), 0
    while run_and_kill(
        partial(convert_slowly, convert, source, tmp_path / "out", **options),
        after=moments.uniform(0.02, 0.08 + 0.02 * kills),
    ):
        kills += 1
        if (tmp_path / "out").exists():  # killed after the last step, the renaming
            break
        assert kills < 200
    assert kills >= 3
    assert_same_files(tmp_path / "out", tmp_path / "wanted")


def test_an_unfinished_conversion_of_another_input_is_not_continued(converted_models: Path, tmp_path: Path) -> None:
    assert run_and_kill(die_after, 20, converted_models / "llama" / "hf", tmp_path / "out")
    report = hf_to_megatron(converted_models / "qwen3" / "hf", tmp_path / "out", file_bytes=60_000)
    assert len(report.redone) == report.num_files


def test_a_full_disk_names_the_tensor_and_leaves_no_output(converted_models: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(
            UserError, match=r"no space left for model\.safetensors .*model\..*\[.*free space"
        ) as caught:
            megatron_to_hf(converted_models / "llama" / "megatron", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "of shape (" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_too_little_disk_space_is_found_before_anything_is_written(
    converted_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"its file system has 1000 \(largest tensor: .* of shape"):
        hf_to_megatron(converted_models / "llama" / "hf", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


class MaliciousPickle:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch executed",)


def change_metadata(folder: Path, change: Any) -> None:
    found = pickle.loads((folder / ".metadata").read_bytes())
    (folder / ".metadata").write_bytes(pickle.dumps(change(found)))


def remove_key(key: str) -> Any:
    def change(found: Any) -> Any:
        found.state_dict_metadata.pop(key)
        return found

    return change


def set_shape(key: str, shape: tuple[int, ...]) -> Any:
    def change(found: Any) -> Any:
        found.state_dict_metadata[key].size = torch.Size(shape)
        return found

    return change


def rename_key(key: str) -> Any:
    def change(found: Any) -> Any:
        found.state_dict_metadata["decoder.extra.weight"] = found.state_dict_metadata[key]
        found.storage_data = dict(found.storage_data) | {
            type(k)("decoder.extra.weight", k.offset): v for k, v in found.storage_data.items() if k.fqn == key
        }
        return found

    return change


def set_dtype(key: str, dtype: torch.dtype) -> Any:
    def change(found: Any) -> Any:
        found.state_dict_metadata[key].properties.dtype = dtype
        return found

    return change


def set_parts(key: str, parts: Any) -> Any:
    def change(found: Any) -> Any:
        found.state_dict_metadata[key].chunks = parts(found.state_dict_metadata[key].chunks)
        return found

    return change


FC2, NORM = "decoder.layers.mlp.linear_fc2.weight", "decoder.final_layernorm.weight"
DAMAGE: dict[str, tuple[Any, str]] = {
    "truncated": (
        lambda f: os.truncate(f / "__0_0.distcp", 90_000),
        r"has 90000 bytes; \S+ of shape \(.*part of shape \(",
    ),
    "no file": (lambda f: (f / "__0_0.distcp").unlink(), r"__0_0.distcp: was not found; \S+ of shape"),
    "missing": (lambda f: change_metadata(f, remove_key(FC2)), rf"has no {FC2} of shape \(2, 128, 96\)"),
    "shape": (
        lambda f: change_metadata(f, set_shape(FC2, (2, 128, 95))),
        rf"{FC2} has shape \(2, 128, 95\), config.json says \(2, 128, 96\)",
    ),
    "dtype": (
        lambda f: change_metadata(f, set_dtype(FC2, torch.bfloat16)),
        rf"{FC2}, part of shape \(1, 128, 96\), has dtype torch.float32, .metadata says torch.bfloat16 for all of",
    ),
    "integers": (
        lambda f: change_metadata(f, set_dtype(FC2, torch.int32)),
        rf"{FC2} of shape \(2, 128, 96\) has dtype torch.int32, a weight of shape \(2, 128, 96\) is float32",
    ),
    "a part missing": (
        lambda f: change_metadata(f, set_parts(FC2, lambda parts: parts[1:])),
        rf"{FC2} of shape \(2, 128, 96\) has 24576 numbers, its parts of shapes \[\(1, 128, 96\)\] \(of 1\) have 12288",
    ),
    "a part twice": (
        lambda f: change_metadata(f, set_parts(FC2, lambda parts: [parts[0], parts[0]])),
        rf"{FC2} of shape \(2, 128, 96\) has two parts at \(0, 0, 0\), of shape \(1, 128, 96\)",
    ),
    "left over": (lambda f: change_metadata(f, rename_key(NORM)), r"holds decoder.extra.weight of shape \(128,\)"),
    "pickle": (
        lambda f: change_metadata(f, lambda _: MaliciousPickle()),
        r"contains posix.system, which is not part of",
    ),
    "garbage": (lambda f: (f / ".metadata").write_bytes(b"x"), r"\.metadata: cannot be read"),
}


@pytest.mark.parametrize("fault", DAMAGE)
def test_a_damaged_megatron_checkpoint_is_rejected_with_the_reason(
    converted_models: Path, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(converted_models / "llama" / "megatron", tmp_path / "damaged")
    DAMAGE[fault][0](tmp_path / "damaged" / "release")
    with pytest.raises(UserError, match=DAMAGE[fault][1]):
        megatron_to_hf(tmp_path / "damaged", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_bytes_that_are_not_a_saved_tensor_are_rejected(converted_models: Path, tmp_path: Path) -> None:
    shutil.copytree(converted_models / "llama" / "megatron", tmp_path / "damaged")
    path = tmp_path / "damaged" / "release" / "__0_0.distcp"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(UserError, match=r"part of shape \(.*cannot be read"):
        megatron_to_hf(tmp_path / "damaged", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["damaged"]


def test_an_output_folder_with_content_is_not_changed(converted_models: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(UserError, match="exists and is not empty"):
        hf_to_megatron(converted_models / "llama" / "hf", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_the_tools_return_the_exit_codes_of_their_help(
    converted_models: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """test_readme_commands.py starts the tools as processes."""
    hf, megatron = str(converted_models / "qwen3" / "hf"), str(tmp_path / "megatron")
    assert hf_to_megatron_tool([hf, megatron, "--json", "--dtype", "bf16"]) == 0
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["tensors"] == len(read_tensors(Path(hf)))
    assert megatron_to_hf_tool([megatron, str(tmp_path / "back"), "--dtype", "fp32"]) == 0
    capfd.readouterr()
    assert compare_checkpoints_tool([hf, megatron, "--json"]) == 1
    summary = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert 0 < summary["max_abs_difference"] < 0.01
    assert {each["verdict"] for each in summary["different"]} == {"dtype"}
    assert hf_to_megatron_tool([str(tmp_path), str(tmp_path / "out")]) == 2
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "has no config.json" in shown.err
    assert "Traceback" not in shown.err


def test_a_comparison_across_formats_names_the_differences(converted_models: Path, tmp_path: Path) -> None:
    hf = tmp_path / "changed"
    shutil.copytree(converted_models / "llama" / "hf", hf)
    tensors = read_tensors(hf)
    up, down, norm = (f"model.layers.1.{n}.weight" for n in ("mlp.up_proj", "mlp.down_proj", "input_layernorm"))
    tensors[up][95, 127] += 0.5
    tensors[down] = tensors[down][:, :-1].clone()
    del tensors[norm]
    tensors["extra"] = torch.ones(1)
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    megatron = converted_models / "llama" / "megatron"
    found = {
        c.name: (c.verdict, c.max_abs_difference)
        for c in compare(open_checkpoint(megatron, None, hf), open_checkpoint(hf, None, megatron))
        if c.verdict != "equal"
    }
    assert found[up] == ("value", pytest.approx(0.5))
    assert found | {up: 0} == {up: 0, down: ("shape", None), norm: ("only in A", None), "extra": ("only in B", None)}
    same = compare(open_checkpoint(megatron, None, hf), open_checkpoint(converted_models / "llama" / "hf", None, hf))
    assert {c.verdict for c in same} == {"equal"}


def test_a_negative_zero_differs_from_zero(tmp_path: Path) -> None:
    for name, value in (("a", 0.0), ("b", -0.0)):
        (tmp_path / name).mkdir()
        save_file({"x": torch.tensor([value])}, tmp_path / name / "model.safetensors")
    (found,) = compare(HfFiles(tmp_path / "a"), HfFiles(tmp_path / "b"))
    assert (found.verdict, found.max_abs_difference) == ("value", 0.0)
