"""How conversations become text: the tokenizer's own chat template, or another one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from tunery.entries import EntryConfig, Transform
from tunery.transforms._sandbox import check_jinja

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}
{%- else %}{{- message['content'] + '<|im_end|>' }}
{%- endif %}{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

_PLAIN = """\
{%- if bos_token %}{{- bos_token }}{%- endif %}
{%- for message in messages %}
{%- if message['role'] == 'assistant' %}
{{- 'Assistant:' }}
{%- generation %}{{- ' ' + message['content'] + eos_token }}{%- endgeneration %}
{%- else %}{{- message['role'] | capitalize + ': ' + message['content'] }}
{%- endif %}{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'Assistant:' }}{%- endif %}"""

TEMPLATES: dict[str, str] = {"chatml": _CHATML, "plain": _PLAIN}
"""Templates of our own, with generation marks, for base models that bring none."""


class ChatTemplateConfig(EntryConfig):
    name: Literal["chatml", "plain"] | None = Field(
        None,
        description="A built-in template instead of the tokenizer's. `chatml`: "
        "<|im_start|>role … <|im_end|>; `plain`: 'User: … Assistant: …' ended by the stop token.",
    )
    template: str | None = Field(
        None, description="A Jinja template instead of the tokenizer's; runs sandboxed."
    )
    system: str | None = Field(
        None, description="System message for conversations that have none of their own."
    )
    template_kwargs: dict[str, str | int | float | bool | None] = Field(
        default_factory=dict,
        description="Variables handed to the template, such as `enable_thinking`. A row's own "
        "`chat_template_kwargs` win.",
    )

    @field_validator("template")
    @classmethod
    def _parses(cls, value: str | None) -> str | None:
        return None if value is None else check_jinja(value)

    @field_validator("template_kwargs")
    @classmethod
    def _names_are_free(cls, value: dict[str, Any]) -> dict[str, Any]:
        taken = sorted(_TAKEN & value.keys())
        if taken:
            raise ValueError(f"{', '.join(taken)}: set by the trainer itself")
        return value

    @model_validator(mode="after")
    def _one_template(self) -> ChatTemplateConfig:
        if self.name is not None and self.template is not None:
            raise ValueError("give `name` or `template`, not both")
        return self


_TAKEN = {
    "messages",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "chat_template",
    "return_dict",
    "return_assistant_tokens_mask",
}


class ChatTemplate:
    name: ClassVar[str] = "chat_template"
    title: ClassVar[str] = "Chat template"
    summary: ClassVar[str] = "Renders conversations with the model's own or another chat template."
    paper: ClassVar[str | None] = None
    Config: ClassVar[type[EntryConfig]] = ChatTemplateConfig
    example: ClassVar[Mapping[str, Any]] = {
        "type": "chat_template",
        "system": "You answer support messages as strict JSON.",
    }
    formats: ClassVar[frozenset[str]] = frozenset(
        {"chat", "preference", "unpaired_preference", "prompt"}
    )

    def produces(self, config: ChatTemplateConfig, format: str) -> str:
        """Format of the rows out: that of the rows in."""
        return format

    def apply(
        self, config: ChatTemplateConfig, rows: Sequence[dict[str, Any]], tokenizer: Any
    ) -> list[dict[str, Any]]:
        """Rows with system message and template variables; sets the tokenizer's chat template.

        The template becomes the tokenizer's own, so that it is saved with the adapter and whoever
        serves the result renders prompts as they were trained.
        """
        template = TEMPLATES[config.name] if config.name is not None else config.template
        if template is not None:
            tokenizer.chat_template = template
        return [_prepared(config, row) for row in rows]


def _prepared(config: ChatTemplateConfig, row: dict[str, Any]) -> dict[str, Any]:
    out = dict(row)
    if config.template_kwargs:
        own = row.get("chat_template_kwargs") or {}
        out["chat_template_kwargs"] = {**config.template_kwargs, **own}
    if config.system is not None:
        if "messages" in row:
            out["messages"] = _with_system(config.system, row["messages"])
        elif "input" in row:
            out["input"] = {
                **row["input"],
                "messages": _with_system(config.system, row["input"]["messages"]),
            }
        elif isinstance(row.get("prompt"), list):
            out["prompt"] = _with_system(config.system, row["prompt"])
    return out


def _with_system(system: str, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    if messages and messages[0]["role"] in ("system", "developer"):
        return list(messages)
    return [{"role": "system", "content": system}, *messages]


ENTRY: type[Transform] = ChatTemplate
