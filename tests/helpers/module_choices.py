"""Modules of the policy that tests build."""

from grpo_mega.policy.module_choice import ModuleChoice

LOCAL_ON_CPU = ModuleChoice(transformer_engine=False, device="cpu")
LOCAL_ON_CUDA = ModuleChoice(transformer_engine=False, device="cuda")
TRANSFORMER_ENGINE = ModuleChoice(transformer_engine=True, device="cuda")
