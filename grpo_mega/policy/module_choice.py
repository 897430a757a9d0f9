"""Decides which modules compute the policy, from `policy.modules`, the device and what is installed.

Every field of Megatron's config that depends on the kind of modules or on the device comes from `ModuleChoice`. Needs
neither torch nor Megatron, so the rules are checked before a rank imports them.
Asserted by tests/unit/policy/test_module_choice.py and tests/unit/policy/test_local_modules_on_cuda.py.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from grpo_mega.config.schema import Config
from grpo_mega.models.spec import ModelSpec
from grpo_mega.parallel.devices import has_cuda_driver
from grpo_mega.types import UserError

TRANSFORMER_ENGINE = "2.20.2"
"""Release whose modules tests/unit/policy/test_transformer_engine_modules.py builds."""
INSTALL_TRANSFORMER_ENGINE = (
    f"pip install --no-build-isolation 'transformer-engine[core_cu13,pytorch]=={TRANSFORMER_ENGINE}'"
)

_SINKS_CUDNN = (9, 18)  # dot_product_attention/utils.py:1242: packed rows with a learnable softmax


@dataclass(frozen=True)
class ModuleChoice:
    """The modules of the policy, and the device on which they are built."""

    transformer_engine: bool
    """True: Transformer Engine's modules. False: Megatron's local modules with those of this project."""
    device: Literal["cpu", "cuda", "meta"]

    @property
    def on_meta(self) -> ModuleChoice:
        """The same modules on the meta device, which takes no memory."""
        return replace(self, device="meta")

    def fields(self) -> dict[str, Any]:
        """Return the fields of Megatron's TransformerConfig that follow from the choice alone."""
        # Transformer Engine's modules would be built on the CPU with use_cpu_initialization, even on the meta device
        # (extensions/transformer_engine.py:407). Megatron's local modules use the default device with it.
        on_default_device = self.device == "cpu" or (self.device == "meta" and not self.transformer_engine)
        return {
            "transformer_impl": "transformer_engine" if self.transformer_engine else "local",
            "use_cpu_initialization": on_default_device,
            "init_model_with_meta_device": self.device == "meta",
        }


LOCAL_ON_META = ModuleChoice(transformer_engine=False, device="meta")
"""Modules that are only counted: they have the parameters of Transformer Engine's, under other names."""

Version = Callable[[str], str | None]


def installed(name: str) -> str | None:
    """Return the version of a distribution, or None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def transformer_engine_release(version: Version = installed) -> str | None:
    """Return the release of the installed Transformer Engine, or None."""
    return version("transformer-engine") or version("transformer-engine-torch")


def choose_modules(config: Config, *, on_cuda: bool | None = None, version: Version = installed) -> ModuleChoice:
    """Return the modules of the policy on this machine.

    Args:
        config: the run.
        on_cuda: whether the ranks compute on CUDA devices; None: whether the NVIDIA driver is loaded.
        version: returns the version of an installed distribution.

    Raises:
        UserError: `policy.modules` or `precision.fp8` needs Transformer Engine, and there is no CUDA device, or it is
            not installed.
    """
    on_cuda = has_cuda_driver() if on_cuda is None else on_cuda
    wanted, release = config.policy.modules, transformer_engine_release(version)
    needed_by = None
    if config.precision.fp8 is not None:
        needed_by = f"precision.fp8.recipe={config.precision.fp8.recipe}"
    if wanted == "transformer_engine":
        needed_by = "policy.modules=transformer_engine"
    if needed_by is not None and not on_cuda:
        raise UserError(
            f"{needed_by} needs CUDA devices, which Transformer Engine computes on, and this machine has none",
            remedy="set policy.modules=auto or local, and leave precision.fp8 out",
        )
    if needed_by is not None and release is None:
        raise UserError(
            f"{needed_by} needs Transformer Engine, which is not installed", remedy=INSTALL_TRANSFORMER_ENGINE
        )
    return ModuleChoice(
        transformer_engine=on_cuda and wanted != "local" and release is not None, device="cuda" if on_cuda else "cpu"
    )


def check_attention(spec: ModelSpec, config: Config, choice: ModuleChoice, version: Version = installed) -> None:
    """Check that the attention of the chosen modules supports the model.

    Transformer Engine computes attention sinks of packed rows with cuDNN only, and not in every layout
    (pytorch/attention/dot_product_attention/utils.py of 2.20.2: lines 1222 to 1254 and 1761).

    Raises:
        UserError: the model has attention sinks, and Transformer Engine cannot train them; the remedy names local
            modules, which can.
    """
    if not (choice.transformer_engine and spec.attention_sinks):
        return
    release, cudnn = transformer_engine_release(version), version("nvidia-cudnn-cu13")
    cp_comm = config.parallel.megatron.get("cp_comm_type", "p2p")
    reason = None
    if release is not None and _numbers(release) < _numbers(TRANSFORMER_ENGINE):
        reason = f"Transformer Engine {release} is older than {TRANSFORMER_ENGINE}"
    elif cudnn is not None and _numbers(cudnn)[:2] < _SINKS_CUDNN:
        reason = f"nvidia-cudnn-cu13 {cudnn} is older than {_SINKS_CUDNN[0]}.{_SINKS_CUDNN[1]}"
    elif config.parallel.cp > 1 and cp_comm != "a2a":
        reason = f"parallel.cp={config.parallel.cp} needs parallel.megatron.cp_comm_type=a2a"
    elif config.run.deterministic:
        reason = "run.deterministic=true excludes its only kernel"
    if reason is not None:
        raise UserError(
            f"policy.modules={config.policy.modules}: the attention of Transformer Engine does not support attention "
            f"sinks in packed rows here: {reason}",
            remedy="set policy.modules=local",
        )


def _numbers(release: str) -> tuple[int, ...]:
    """Return the leading numbers of a release: "2.20.2+abc" -> (2, 20, 2)."""
    return tuple(int(part) for part in release.split("+")[0].split(".")[:3] if part.isdigit())
