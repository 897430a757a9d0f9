"""The config key that an unknown key probably stands for.

A key may have the name that another system gives to the same setting, be in another section, or be misspelled.
Asserted by tests/unit/config/test_key_suggestions.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from grpo_mega.config.nearest_name import edit_distance, nearest_name

NAMES_ELSEWHERE: Mapping[str, str] = {
    # transformers' TrainingArguments and TRL's GRPOConfig
    "batch_size": "data.prompts_per_step",
    "beta": "algorithm.kl_coef",
    "epsilon": "algorithm.clip_low",
    "epsilon_high": "algorithm.clip_high",
    "eval_steps": "evaluation.every",
    "learning_rate": "optimizer.lr",
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "adam_epsilon": "optimizer.eps",
    "lr_scheduler_type": "optimizer.schedule",
    "max_grad_norm": "optimizer.clip_grad",
    "optim": "optimizer.name",
    "warmup_ratio": "optimizer.warmup_fraction",
    "warmup_steps": "optimizer.warmup_updates",
    "loss_type": "algorithm.aggregation",
    "mask_truncated_completions": "algorithm.overlong_filter",
    "max_completion_length": "sampling.max_tokens",
    "max_new_tokens": "sampling.max_tokens",
    "max_prompt_length": "data.max_prompt_tokens",
    "max_steps": "train.steps",
    "model_name_or_path": "model.path",
    "num_generations": "sampling.group_size",
    "num_iterations": "train.epochs_per_rollout",
    "output_dir": "run.dir",
    "ref_model_sync_steps": "algorithm.ref_update_every",
    "resume_from_checkpoint": "checkpoint.resume",
    "reward_funcs": "reward.terms",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "scale_rewards": "algorithm.advantage",
    "vllm_gpu_memory_utilization": "engine.memory_share",
    "vllm_tensor_parallel_size": "engine.tp",
    # verl's ppo_megatron_trainer.yaml
    "adv_estimator": "algorithm.advantage",
    "clip_ratio": "algorithm.clip_low",
    "clip_ratio_high": "algorithm.clip_high",
    "clip_ratio_low": "algorithm.clip_low",
    "default_local_dir": "run.dir",
    "entropy_coeff": "algorithm.entropy_coef",
    "gpu_memory_utilization": "engine.memory_share",
    "kl_loss_coef": "algorithm.kl_coef",
    "loss_agg_mode": "algorithm.aggregation",
    "lr_decay_steps": "optimizer.decay_updates",
    "lr_decay_style": "optimizer.schedule",
    "lr_warmup_steps": "optimizer.warmup_updates",
    "lr_warmup_steps_ratio": "optimizer.warmup_fraction",
    "max_response_length": "sampling.max_tokens",
    "n": "sampling.group_size",
    "ppo_epochs": "train.epochs_per_rollout",
    "ppo_max_token_len_per_gpu": "train.max_tokens_per_microbatch",
    "save_freq": "checkpoint.every",
    "test_freq": "evaluation.every",
    "total_training_steps": "train.steps",
    "train_batch_size": "data.prompts_per_step",
    "train_files": "data.train",
    "val_files": "data.eval",
    # slime's arguments, and Megatron-LM's, which it takes
    "context_parallel_size": "parallel.cp",
    "eps_clip": "algorithm.clip_low",
    "eps_clip_high": "algorithm.clip_high",
    "eval_interval": "evaluation.every",
    "expert_model_parallel_size": "parallel.ep",
    "expert_tensor_parallel_size": "parallel.etp",
    "hf_checkpoint": "model.path",
    "lr_decay_iters": "optimizer.decay_updates",
    "lr_warmup_fraction": "optimizer.warmup_fraction",
    "lr_warmup_iters": "optimizer.warmup_updates",
    "use_precision_aware_optimizer": "optimizer.moments",
    "n_samples_per_prompt": "sampling.group_size",
    "num_rollout": "train.steps",
    "pipeline_model_parallel_size": "parallel.pp",
    "prompt_data": "data.train",
    "rollout_batch_size": "data.prompts_per_step",
    "rollout_max_response_len": "sampling.max_tokens",
    "rollout_temperature": "sampling.temperature",
    "save_interval": "checkpoint.every",
    "sglang_mem_fraction_static": "engine.memory_share",
    "tensor_model_parallel_size": "parallel.tp",
    "tensor_parallel_size": "engine.tp",
}
"""Name of a setting in TRL, verl or slime -> the key here."""


def suggest_key(key: str, known: Sequence[str]) -> str | None:
    """Return the known key that `key` probably stands for, or None.

    In this order: the key of a name that another system uses; a key of the same name in another section, the one whose
    whole path needs the fewest edits; the key whose whole path is near (nearest_name.py).

    Args:
        key: an unknown key, for example `optimizer.learning_rate` or `learning-rate`.
        known: all keys, each after its section.
    """
    path = ".".join(part for part in key.replace("-", "_").split(".") if not part.isdigit())
    last = path.rpartition(".")[2].lower()
    if last in NAMES_ELSEWHERE and NAMES_ELSEWHERE[last] in known:
        return NAMES_ELSEWHERE[last]
    elsewhere = [each for each in known if each.rpartition(".")[2] == last and "." in each]
    if elsewhere:
        return min(elsewhere, key=lambda each: edit_distance(path, each))
    sections = [each for each in known if any(other.startswith(f"{each}.") for other in known)]
    return nearest_name(path, sections if "." not in path else [each for each in known if each not in sections]) or (
        nearest_name(path, known)
    )
