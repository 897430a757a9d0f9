"""The first prompt of a run as the engine gets it, and everything that ends an answer."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from grpo_mega.config.schema import Config
from grpo_mega.data.answer_ends import eos_ids
from grpo_mega.data.example_rows import example_sets, read_examples
from grpo_mega.data.prompt_rows import keyed_sets, read_rows
from grpo_mega.doctor.finding import Finding, tried
from grpo_mega.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from grpo_mega.data.prompt_template import PromptTemplate

_MAX_IDS = 400


def check_prompt(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[Finding]:
    """Show the first prompt with its tokens, and the end of its answer.

    In supervised fine-tuning show the first example instead, with the parts that are trained, and the end of an answer
    only if there is an evaluation.

    Returns:
        The findings `prompt` and `end of an answer`. The second is a warning if the chat template ends an answer with a
        special token that does not end the answers of the policy.
    """
    if config.is_sft:
        shown = tried("example", lambda: _first_example(config, tokenizer))
    else:
        shown = tried("prompt", lambda: _first_prompt(config, tokenizer))
    return [shown, _answer_end(config, tokenizer)] if config.has_engine else [shown]


def _first_example(config: Config, tokenizer: PreTrainedTokenizerBase) -> str:
    from grpo_mega.data.example_template import ExampleTemplate

    key, source = example_sets(config.data)[0]
    row = next((row for row in read_examples(source, key, config.data) if row is not None), None)
    if row is None:
        raise UserError(f"{key}={source.path} has no row that passes the filters", remedy="change the filters")
    try:
        rendered = ExampleTemplate(config.data, tokenizer).render(row)
    except UserError:
        raise
    except Exception as error:  # a template is a program and can raise anything
        raise UserError(f"{row.where}: the example cannot be encoded ({error})", remedy="change it") from error
    parts = []
    for is_answer, group in itertools.groupby(
        zip(rendered.is_answer, rendered.token_ids, strict=True), key=lambda pair: pair[0]
    ):
        text = tokenizer.decode([token_id for _, token_id in group], skip_special_tokens=False)
        parts.append(f"{'trained' if is_answer else 'read'}: {text!r}")
    return f"{row.where}, {len(rendered.token_ids)} tokens, {sum(rendered.is_answer)} trained\n" + "\n".join(parts)


def _first_prompt(config: Config, tokenizer: PreTrainedTokenizerBase) -> str:
    from grpo_mega.data.prompt_template import PromptTemplate

    key, source = keyed_sets(config.data)[0]
    row = next((row for row in read_rows(source, key, config.data) if row is not None), None)
    if row is None:
        raise UserError(f"{key}={source.path} has no row that passes the filters", remedy="change the filters")
    try:
        rendered = PromptTemplate(config.data, tokenizer).render(row.prompt)
    except UserError:
        raise
    except Exception as error:  # a template is a program and can raise anything
        raise UserError(f"{row.where}: the prompt cannot be encoded ({error})", remedy="change it") from error
    ids = [str(token_id) for token_id in rendered.token_ids]
    if len(ids) > _MAX_IDS:
        ids = [*ids[: _MAX_IDS // 2], "...", *ids[-_MAX_IDS // 2 :]]
    return f"{row.where}, {len(rendered.token_ids)} tokens: {rendered.text!r}\ntoken ids: {' '.join(ids)}"


def _answer_end(config: Config, tokenizer: PreTrainedTokenizerBase) -> Finding:
    name = "end of an answer"
    try:
        ends = _eos_of(config, tokenizer)
        parts = [_names(tokenizer, ends), *_stop_texts(config), f"after {config.sampling.max_tokens} tokens"]
        closing = _closing_token(config, tokenizer)
    except UserError as error:
        return Finding(name, "fail", error.message, error.remedy or "change it")
    message = f"{', '.join(parts[:-1])} or {parts[-1]}"
    if closing is not None and closing not in ends:
        return Finding(
            name, "warn",
            f"{message}; the chat template ends answers with {_names(tokenizer, (closing,))}, which is not among them",
            "add this token to eos_token_id in generation_config.json",
        )  # fmt: skip
    return Finding(name, "pass", message)


def _eos_of(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    if config.model.path is None:  # the config.json of a tiny base names the EOS token of its tokenizer
        return (tokenizer.eos_token_id,)
    return eos_ids(config.model.folder, tokenizer.eos_token_id)


def _names(tokenizer: PreTrainedTokenizerBase, token_ids: tuple[int, ...]) -> str:
    return ", ".join(f"{tokenizer.convert_ids_to_tokens(token_id)} ({token_id})" for token_id in token_ids)


def _stop_texts(config: Config) -> list[str]:
    """Return the stop texts of the environment, and the text around its replies."""
    from grpo_mega.environments.base import build_environment

    environment = config.environment
    if environment is None:
        return []
    stop = environment.stop if environment.stop is not None else build_environment(environment).stop
    texts = [f"the stop text {text!r}" for text in stop]
    if environment.before or environment.after:
        texts.append(f"replies are put between {environment.before!r} and {environment.after!r}")
    return texts


def _closing_token(config: Config, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the special token that the chat template writes after an answer; None if it writes another one or none."""
    from grpo_mega.data.prompt_template import PromptTemplate

    if config.data.template == "plain":
        return None
    template = PromptTemplate(config.data, tokenizer)
    try:
        return _token_after_answer(template, tokenizer)
    except UserError:
        raise
    except Exception:  # the check of the chat template reports it
        return None


def _token_after_answer(template: PromptTemplate, tokenizer: PreTrainedTokenizerBase) -> int | None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    begin = template.render(turns).text
    whole = template.render([*turns, {"role": "user", "content": "c"}]).text
    if not whole.startswith(begin):
        return None
    after = tokenizer.encode(whole[len(begin) :], add_special_tokens=False, split_special_tokens=False)
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return after[0] if after and after[0] in special else None
