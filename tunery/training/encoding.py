"""Rows of text as tokens, and which of the tokens are learnt.

A chat template says how a conversation is written, seldom which part of it the assistant said.
Where it has `{% generation %}` marks they are believed. Elsewhere the spans follow from rendering:
what stands between "everything before the reply, reply asked for" and "everything up to the reply"
is the reply. Both are read off the one text that is tokenised, by character offsets, so a span can
never be off by a merge of the tokenizer.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import jinja2
import numpy as np

from tunery.errors import InvalidData
from tunery.training.types import DISCOUNTS, IGNORE, Document, Example

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

    from tunery.training.types import EncodeOptions

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
ENCODER_VERSION = 1
"""Part of the cache's key: raise it when the same row would give other tokens."""


def encode_row(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    options: EncodeOptions,
    index: int,
) -> Example:
    """A row of chat, prompt_completion, text or preference data; the label of an unpaired
    preference is its target, 1 for a wanted reply.

    Raises:
        InvalidData: the row cannot be rendered or tokenised; names the row, quotes nothing.
    """
    encode = _prompt if options.train_on == "none" else _ENCODERS[options.format]
    try:
        documents = encode(row, tokenizer, options)
    except InvalidData as error:
        raise InvalidData(f"row {index}: {error.message}", code=error.code) from error
    target = int(row["label"]) if options.format == "unpaired_preference" else None
    return Example(documents=documents, target=target, index=index)


def _chat(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, options: EncodeOptions
) -> tuple[Document, ...]:
    return (_conversation(row["messages"], row, tokenizer, options),)


def _prompt_completion(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, options: EncodeOptions
) -> tuple[Document, ...]:
    prompt, completion = row["prompt"], row["completion"]
    if not isinstance(prompt, str):
        return (_conversation([*_context(prompt), *completion], row, tokenizer, options),)
    start = 0 if options.train_on == "all" else len(prompt)
    return (_plain(prompt + completion, start, tokenizer, options),)


def _text(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, options: EncodeOptions
) -> tuple[Document, ...]:
    return (_plain(row["text"], 0, tokenizer, options),)


def _preference(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, options: EncodeOptions
) -> tuple[Document, ...]:
    context = _context(row["input"]["messages"])
    extra = {**row, **row["input"]}
    both = [
        _conversation([*context, *row[side]], extra, tokenizer, options)
        for side in ("preferred_output", "non_preferred_output")
    ]
    return (_with_prompt(both[0]) if options.score_prompts else both[0], both[1])


def _unpaired(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, options: EncodeOptions
) -> tuple[Document, ...]:
    messages = [*_context(row["prompt"]), *row["completion"]]
    return (_conversation(messages, row, tokenizer, options),)


_ENCODERS = {
    "chat": _chat,
    "prompt_completion": _prompt_completion,
    "text": _text,
    "preference": _preference,
    "unpaired_preference": _unpaired,
}


def _prompt(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, options: EncodeOptions
) -> tuple[Document, ...]:
    """What a reply is asked with; a reply that the row itself ends with is left out."""
    asked = row.get("messages", row.get("prompt"))
    if isinstance(asked, str):
        ids, _ = _tokenise(asked, tokenizer)
        if ids[:1] != [tokenizer.bos_token_id] and _puts_bos(tokenizer):
            ids = [_bos(tokenizer), *ids]
    else:
        messages = [_flat(message) for message in asked or ()]
        if messages and messages[-1]["role"] == "assistant":
            messages.pop()
        text = _Chat(messages, row, tokenizer, options).render(len(messages), ask=True)
        ids, _ = _tokenise(text, tokenizer)
        ids, _ = _one_bos(ids, [0.0] * len(ids), tokenizer.bos_token_id)
    if not ids:
        raise InvalidData("the prompt is empty", code="empty_messages")
    return (_document(ids[-options.max_length :], [0.0] * len(ids), options.max_length),)


def _context(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same messages, none of them learnt."""
    return [{**message, "weight": 0} for message in messages]


def _plain(
    text: str, start: int, tokenizer: PreTrainedTokenizerBase, options: EncodeOptions
) -> Document:
    """BOS (if the tokenizer puts one), text, EOS; learnt from character `start` on, EOS too.

    Prompt and completion are tokenised as one text; a token that straddles the border is learnt.
    """
    ids, ends = _tokenise(text, tokenizer)
    learnt = [end > start for _, end in ends]
    if ids and ids[0] == tokenizer.bos_token_id:
        learnt[0] = False
    elif _puts_bos(tokenizer):
        ids, learnt = [_bos(tokenizer), *ids], [False, *learnt]
    if tokenizer.eos_token_id is not None and (not ids or ids[-1] != tokenizer.eos_token_id):
        ids, learnt = [*ids, _eos(tokenizer)], [*learnt, True]
    return _document(ids, learnt, options.limit)


def _conversation(
    messages: Sequence[Mapping[str, Any]],
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    options: EncodeOptions,
) -> Document:
    chat = _Chat([_flat(message) for message in messages], row, tokenizer, options)
    text = chat.render(len(chat.messages))
    ids, offsets = _tokenise(text, tokenizer)
    if options.train_on == "all":
        learnt = [1.0] * len(ids)
    else:
        learnt = [0.0] * len(ids)
        for span in chat.spans(text):
            for position in _positions(span, ids, offsets, text, _specials(tokenizer)):
                learnt[position] = span.weight
    ids, learnt = _one_bos(ids, learnt, tokenizer.bos_token_id)
    return _document(ids, learnt, options.limit)


def _document(ids: Sequence[int], learnt: Sequence[float], limit: int | None) -> Document:
    """`learnt` says by which weight: 0 is not at all."""
    input_ids = np.asarray(ids[:limit], dtype=np.int32)
    weights = np.asarray(learnt[:limit], dtype=np.float32)
    labels = np.where(weights != 0, input_ids, np.int32(IGNORE))
    if np.isin(weights, (0, 1)).all():
        return Document(input_ids, labels)
    return Document(input_ids, labels, tracks={DISCOUNTS: 1 - weights})


def _with_prompt(document: Document) -> Document:
    """Every token supervised, those of the prompt with weight 0."""
    prompt = document.labels == IGNORE
    return Document(
        document.input_ids, document.input_ids, tracks={DISCOUNTS: prompt.astype(np.float32)}
    )


def _flat(message: Mapping[str, Any]) -> dict[str, Any]:
    """Content given as text parts becomes one text: not every template knows parts."""
    content = message.get("content")
    if isinstance(content, list) and all(part.get("type") == "text" for part in content):
        return {**message, "content": "".join(part["text"] for part in content)}
    return {**message, "content": "" if content is None else content}


@dataclass(frozen=True, slots=True)
class _Span:
    """Characters of the rendered text that one message's author produced."""

    start: int
    end: int
    weight: float = 1.0


class _Chat:
    """A conversation and its template."""

    def __init__(
        self,
        messages: list[dict[str, Any]],
        row: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        options: EncodeOptions,
    ) -> None:
        self.messages = messages
        self.tokenizer = tokenizer
        self.template = template_of(tokenizer, options.chat_template)
        self.given = {
            "tools": row.get("tools"),
            "chat_template": self.template,
            **(row.get("chat_template_kwargs") or {}),
        }
        self.weights = [
            float(message.get("weight", 1)) if message["role"] == "assistant" else 0.0
            for message in messages
        ]

    def render(self, count: int, *, ask: bool = False) -> str:
        """The first `count` messages as text; with `ask`, up to where a reply begins."""
        shown = [
            {k: v for k, v in message.items() if k != "weight"} for message in self.messages[:count]
        ]
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    shown, tokenize=False, add_generation_prompt=ask, **self.given
                )
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
            # Their own words may quote the row; a template's `raise_exception` is one of them.
            raise InvalidData(
                f"the chat template refuses the conversation ({type(error).__name__})",
                code="tokenizer_error",
            ) from error

    def spans(self, text: str) -> list[_Span]:
        """Of the learnt replies, in order, each with its weight."""
        if not any(self.weights):
            return []
        marked = self._marked(text) if _GENERATION.search(self.template) else None
        if marked is not None:
            return marked
        return [
            replace(self._difference(i, text), weight=weight)
            for i, weight in enumerate(self.weights)
            if weight
        ]

    def _marked(self, text: str) -> list[_Span] | None:
        """By the template's marks; None where they cannot be told apart by message."""
        from transformers.utils.chat_template_utils import render_jinja_template

        shown = [{k: v for k, v in m.items() if k != "weight"} for m in self.messages]
        given = {**self.tokenizer.special_tokens_map, **self.given}
        rendered, indices = cast(
            "tuple[Any, Any]",
            render_jinja_template(
                conversations=[shown],
                tools=given.pop("tools"),
                chat_template=given.pop("chat_template"),
                return_assistant_tokens_mask=True,
                **given,
            ),
        )
        found = [_Span(*pair) for pair in indices[0]]
        both = zip(self.messages, self.weights, strict=True)
        replies = [weight for message, weight in both if message["role"] == "assistant"]
        if rendered[0] != text or len(found) != len(replies):
            return None
        return [
            replace(span, weight=weight)
            for span, weight in zip(found, replies, strict=True)
            if weight
        ]

    def _difference(self, i: int, text: str) -> _Span:
        """What message `i` added to the text."""
        before, asked = self._rendered_before(i), self.render(i, ask=True)
        start = _common_prefix(asked, text)
        if start < len(before) or not text.startswith(before):
            return self._by_content(i, text)
        if start < len(asked):
            # The prompt asks for more than this reply has, an opened thought say; what both have in
            # common may be the reply's own.
            at = text.find(self._words(i), len(before))
            start = start if at < 0 else min(start, at)
        through = self.render(i + 1)
        if not text.startswith(through) or len(through) <= start:
            return self._by_content(i, text, start)
        return _Span(start, len(through))

    def _rendered_before(self, i: int) -> str:
        if i == 0:
            return ""
        try:
            return self.render(i)
        except InvalidData:
            # Some templates refuse a conversation that ends with a system message.
            return ""

    def _words(self, i: int) -> str:
        content = self.messages[i]["content"]
        return content.strip() if isinstance(content, str) else ""

    def _by_content(self, i: int, text: str, start: int = 0) -> _Span:
        """Templates that rewrite earlier turns: the reply's own words, after its predecessors'."""
        cursor = start
        for number in range(0 if start == 0 else i, i + 1):
            words = self._words(number)
            at = text.find(words, cursor)
            if at < 0 or (number == i and not words):
                raise InvalidData(
                    "the chat template does not say which tokens are the assistant's: add "
                    "{% generation %} marks to it, or train on all tokens",
                    code="tokenizer_error",
                )
            cursor = at + len(words)
        return _Span(cursor - len(words), cursor)


def _positions(
    span: _Span,
    ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    text: str,
    specials: frozenset[int],
) -> range:
    """Tokens of a reply, its end-of-turn token included and nothing after that.

    Marks often end before the end-of-turn token, and rendered differences after the line break that
    follows it: the first model would never stop, the second learns to go on after stopping.
    """
    inside = [p for p, (start, end) in enumerate(offsets) if start < span.end and end > span.start]
    if not inside:
        return range(0)
    first, last = inside[0], inside[-1]
    enders = [p for p in range(first, last + 1) if ids[p] in specials]
    if enders and not text[offsets[enders[-1]][1] : span.end].strip():
        return range(first, enders[-1] + 1)
    following = last + 1
    if following < len(ids) and ids[following] in specials:
        return range(first, following + 1)
    return range(first, last + 1)


def _tokenise(
    text: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids and their characters; nothing is added in front or behind.

    Raises:
        InvalidData: the tokenizer cannot say which characters a token stands for.
    """
    if not tokenizer.is_fast:
        raise InvalidData(
            "the base model's tokenizer has no fast version, which telling the learnt tokens "
            "apart needs",
            code="tokenizer_error",
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(encoded["input_ids"]), [tuple(pair) for pair in encoded["offset_mapping"]]


def _specials(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    added = tokenizer.added_tokens_decoder
    return frozenset(
        [*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)]
    )


def _puts_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    if tokenizer.bos_token_id is None:
        return False
    return list(tokenizer("a")["input_ids"])[:1] == [tokenizer.bos_token_id]


def _bos(tokenizer: PreTrainedTokenizerBase) -> int:
    return int(tokenizer.bos_token_id)


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    return int(tokenizer.eos_token_id)


def _one_bos(ids: list[int], learnt: list[float], bos: int | None) -> tuple[list[int], list[float]]:
    """BOS at most once in front, and never learnt."""
    if bos is None or ids[:1] != [bos]:
        return ids, learnt
    if ids[1:2] == [bos]:
        ids, learnt = ids[1:], learnt[1:]
    return ids, [0.0, *learnt[1:]]


def _common_prefix(a: str, b: str) -> int:
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[:middle] == b[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def template_of(tokenizer: PreTrainedTokenizerBase, override: str | None = None) -> str:
    """The chat template's source.

    Raises:
        InvalidData: there is none.
    """
    template = override or tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not isinstance(template, str):
        raise InvalidData(
            "the base model has no chat template; choose one with the chat_template transform",
            code="tokenizer_error",
        )
    return template


def template_sha256(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Hash of the chat template, recorded with every adapter; None where there is none."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return hashlib.sha256(template.encode()).hexdigest() if isinstance(template, str) else None
