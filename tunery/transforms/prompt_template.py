"""Rows into prompts: a template over the row's fields, and words for labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from tunery.entries import EntryConfig, Transform
from tunery.errors import InvalidData
from tunery.transforms._sandbox import check_format, check_jinja, render_format, render_jinja

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class PromptTemplateConfig(EntryConfig):
    prompt: str = Field(
        min_length=1,
        description="Template of what the model is given. Fields are the row's: `text` and `label` "
        "of classification data, `prompt` and `completion`, `text`.",
    )
    completion: str = Field(
        min_length=1,
        description="Template of what the model learns to say. `label_word` is the verbalised "
        "label.",
    )
    syntax: Literal["jinja", "format"] = Field(
        "jinja", description="`jinja`: sandboxed Jinja; `format`: plain `{field}` places only."
    )
    output: Literal["prompt_completion", "chat"] = Field(
        "prompt_completion",
        description="Rows out: prompt and completion as they are, or as a user's and an "
        "assistant's message.",
    )
    system: str | None = Field(
        None, description="Template of a system message before the user's; `chat` only."
    )
    verbalizer: dict[str, str] = Field(
        default_factory=dict,
        description="Label to the word that stands for it, offered to templates as `label_word`. "
        "Empty: labels are their own words. Not empty: a label without a word is an error.",
    )

    @model_validator(mode="after")
    def _templates_parse(self) -> PromptTemplateConfig:
        check = check_jinja if self.syntax == "jinja" else check_format
        for name in ("prompt", "completion", "system"):
            source = getattr(self, name)
            if source is not None:
                try:
                    check(source)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error
        if self.system is not None and self.output != "chat":
            raise ValueError("system: needs output 'chat'")
        words = list(self.verbalizer.values())
        if len(set(words)) != len(words):
            raise ValueError("verbalizer: two labels share one word and could not be told apart")
        return self


class PromptTemplate:
    name: ClassVar[str] = "prompt_template"
    title: ClassVar[str] = "Prompt template and verbalizer"
    summary: ClassVar[str] = "Turns rows of fields into prompts, and labels into words."
    paper: ClassVar[str | None] = (
        "Schick, Schütze: Exploiting Cloze Questions for Few Shot Text Classification and Natural "
        "Language Inference, 2021, arXiv 2001.07676"
    )
    Config: ClassVar[type[EntryConfig]] = PromptTemplateConfig
    example: ClassVar[Mapping[str, Any]] = {
        "type": "prompt_template",
        "prompt": "Message: {{ text }}\nSpam?",
        "completion": " {{ label_word }}",
        "verbalizer": {"ham": "no", "spam": "yes"},
    }
    formats: ClassVar[frozenset[str]] = frozenset({"classification", "prompt_completion", "text"})

    def produces(self, config: PromptTemplateConfig, format: str) -> str:
        """Format of the rows out."""
        return config.output

    def apply(
        self, config: PromptTemplateConfig, rows: Sequence[dict[str, Any]], tokenizer: Any
    ) -> list[dict[str, Any]]:
        """One row out for each row in, in order.

        Raises:
            InvalidData: a row lacks a field or a label has no word; names the row by number.
        """
        return [_render(config, index, row) for index, row in enumerate(rows)]


def label_word(verbalizer: Mapping[str, str], label: Any) -> str:
    """The word for a label; without a verbalizer the label itself.

    Raises:
        InvalidData: the verbalizer has no word for it.
    """
    if not verbalizer:
        return str(label)
    if str(label) not in verbalizer:
        raise InvalidData(
            f"the verbalizer has {len(verbalizer)} labels and no word for this one",
            code="label_without_word",
            hint="add every label of the data to `verbalizer`",
        )
    return verbalizer[str(label)]


def _render(config: PromptTemplateConfig, index: int, row: dict[str, Any]) -> dict[str, Any]:
    render = render_jinja if config.syntax == "jinja" else render_format
    try:
        fields = dict(row)
        if "label" in row:
            fields["label_word"] = label_word(config.verbalizer, row["label"])
        prompt, completion = render(config.prompt, fields), render(config.completion, fields)
        system = render(config.system, fields) if config.system is not None else None
    except InvalidData as error:
        raise InvalidData(
            f"prompt_template, row {index + 1}: {error.message}", code=error.code, hint=error.hint
        ) from error
    if config.output == "prompt_completion":
        return {"prompt": prompt, "completion": completion}
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages += [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": completion},
    ]
    return {"messages": messages}


ENTRY: type[Transform] = PromptTemplate
