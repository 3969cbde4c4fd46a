"""question_answering: {"question", "context", "answers"}, each answer a part of the context.

Answers are a list of {"text", "answer_start"}, or, as SQuAD's tables have it, {"text": [...],
"answer_start": [...]}; none where the context does not answer. Starts count characters from 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunery.data.formats._base import Finding, Format, Row, as_it_is, check_strings

if TYPE_CHECKING:
    from collections.abc import Iterator


def _check(row: Row) -> Iterator[Finding]:
    broken = False
    for column in ("context", "question"):
        for finding in check_strings(column)(row):
            broken |= finding.severity == "error"
            yield finding
    answers = _listed(row["answers"])
    if answers is None:
        yield Finding("wrong_type", "answers must be a list of text and answer_start", "answers")
    elif not broken:
        for place, answer in enumerate(answers):
            yield from _check_answer(answer, row["context"], f"answers.{place}")


def _check_answer(answer: Any, context: str, at: str) -> Iterator[Finding]:
    text, start = (answer.get("text"), answer.get("answer_start"))
    if not isinstance(text, str) or not text:
        yield Finding("wrong_type", "text must be a string, not an empty one", f"{at}.text")
    elif isinstance(start, bool) or not isinstance(start, int) or start < 0:
        yield Finding("wrong_type", "answer_start must be a count", f"{at}.answer_start")
    elif not context.startswith(text, start):
        yield Finding(
            "answer_not_in_context",
            "the context does not have the text at answer_start, counted in characters",
            f"{at}.answer_start",
        )


def _listed(answers: Any) -> list[dict[str, Any]] | None:
    """One object per answer; None where it cannot be told."""
    if isinstance(answers, dict):
        texts, starts = answers.get("text", []), answers.get("answer_start", [])
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            return None
        return [{"text": a, "answer_start": b} for a, b in zip(texts, starts, strict=True)]
    if isinstance(answers, list) and all(isinstance(answer, dict) for answer in answers):
        return answers
    return None


def _normal(row: Row) -> Row:
    answers = _listed(row["answers"]) or []
    kept = [{"text": answer["text"], "answer_start": answer["answer_start"]} for answer in answers]
    return {**as_it_is(row), "answers": kept}


def _features(row: Row) -> Iterator[str]:
    if not row["answers"]:
        yield "unanswerable"


FORMAT = Format(
    name="question_answering",
    task="question-answering",
    spellings=(frozenset({"question", "context", "answers"}),),
    check=_check,
    normal=_normal,
    content=("question", "context", "answers"),
    features=_features,
    json_columns=frozenset({"answers"}),
)
