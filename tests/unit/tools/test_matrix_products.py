"""tools/step_sides/matrix_products.py: the operations of the products are those of models/flops.py."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from grpo_mega.models.flops import attention_flops, weights_per_token
from tests.helpers.planner_cases import spec_of

TOOL = Path(__file__).resolve().parents[3] / "tools" / "step_sides" / "matrix_products.py"


@pytest.fixture(scope="module")
def products() -> ModuleType:
    spec = importlib.util.spec_from_file_location("matrix_products_under_test", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_operations_are_those_of_the_model(products: ModuleType) -> None:
    spec, rows = spec_of("llama"), [[5, 9, 31], [7]]  # odd lengths: (L + 1) / 2 keys
    found = products.forward_products(spec, rows)
    lengths = [length for row in rows for length in row]
    by_model = 2 * weights_per_token(spec).total * sum(lengths) + attention_flops(spec, lengths)
    assert products.operations(found) == pytest.approx(by_model)
    assert found[(1, 45, spec.hidden_size, spec.vocab_size)] == 1  # one product with the head per row


def test_products_take_time(products: ModuleType) -> None:
    assert products.cpu_seconds({(1, 256, 256, 256): 20, (4, 32, 16, 32): 3}) > 0


def test_experts_are_rejected(products: ModuleType) -> None:
    with pytest.raises(ValueError, match="only dense models"):
        products.forward_products(spec_of("qwen3_moe"), [[3]])
