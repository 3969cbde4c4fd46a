"""Each reward by hand: row by row of its table, and what it refuses."""

from typing import Any

import pytest
from pydantic import ValidationError

from tunery import catalogue
from tunery.entries import Grade, Sample
from tunery.errors import InvalidConfig, InvalidData
from tunery.rewards._grader import Grader
from tunery.rewards.numeric_answer import answer, numbers


def graded(text: str, item: dict[str, Any] | None = None, **given: Any) -> Grade:
    (grade,) = Grader.of(given).grade([Sample(item or {}, text)])
    return grade


def score(text: str, item: dict[str, Any] | None = None, **given: Any) -> float | None:
    return graded(text, item, **given).reward


# ---- string_check ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "text", "expected"),
    [
        ("eq", "Paris", 1),
        ("eq", "paris", 0),
        ("eq", "Paris.", 0),
        ("ne", "Rome", 1),
        ("ne", "Paris", 0),
        ("like", "It is Paris.", 1),
        ("like", "It is paris.", 0),
        ("ilike", "It is PARIS.", 1),
        ("ilike", "It is Rome.", 0),
    ],
)
def test_string_check(operation: str, text: str, expected: int) -> None:
    given = {"type": "string_check", "operation": operation, "reference": "{{ item.city }}"}
    assert score(text, {"city": "Paris"}, **given) == expected


def test_a_completion_that_cannot_be_read_scores_nothing_and_says_why() -> None:
    given = {"type": "string_check", "input": "{{ sample.output_json.a }}", "reference": "x"}
    assert graded("not json", **given) == Grade(0.0, error="the completion is not JSON")


# ---- text_similarity ---------------------------------------------------------------------------


def alike(text: str, reference: str, metric: str, **more: Any) -> float | None:
    given = {"type": "text_similarity", "reference": "{{ item.r }}", "evaluation_metric": metric}
    return score(text, {"r": reference}, **given, **more)


def test_fuzzy_match_is_the_indel_similarity() -> None:
    # "kitten" to "sitting": 5 edits of single letters among 13; 1 - 5/13.
    assert alike("kitten", "sitting", "fuzzy_match") == pytest.approx(1 - 5 / 13)
    assert alike("", "", "fuzzy_match") == 1.0


def test_bleu_and_rouge_are_those_of_the_field() -> None:
    # Four words of five are right, in order: unigrams 4/5, longest common subsequence 4.
    text, reference = "the cat sat on mats", "the cat sat on rugs"
    assert alike(text, reference, "rouge_1") == pytest.approx(0.8)
    assert alike(text, reference, "rouge_2") == pytest.approx(3 / 4)
    assert alike(text, reference, "rouge_l") == pytest.approx(0.8)
    # BLEU: the geometric mean of 4/5, 3/4, 2/3 and 1/2, no brevity penalty.
    by_hand = (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert alike(text, reference, "bleu") == pytest.approx(by_hand)
    assert alike("a cat", "a cat", "bleu") == pytest.approx(1.0)


def test_a_threshold_makes_it_pass_or_fail() -> None:
    assert alike("kitten", "sitting", "fuzzy_match", pass_threshold=0.6) == 1.0
    assert alike("kitten", "sitting", "fuzzy_match", pass_threshold=0.7) == 0.0


@pytest.mark.parametrize("metric", ["cosine", "meteor", "gleu"])
def test_metrics_that_are_not_at_hand_are_refused_with_the_reason(metric: str) -> None:
    with pytest.raises(InvalidConfig, match=f"{metric} (needs|is not offered)"):
        alike("a", "b", metric)


# ---- regex -------------------------------------------------------------------------------------


def test_regex_takes_any_part_or_the_whole() -> None:
    pattern = r"<think>.+</think>\s*\w+"
    text = "<think>two\nlines</think> yes"
    assert score(f"so: {text}", type="regex", pattern=pattern) == 1.0
    assert score(f"so: {text}", type="regex", pattern=pattern, full_match=True) == 0.0
    assert score("yes", type="regex", pattern=pattern, mismatch_reward=-0.5) == -0.5


def test_a_broken_expression_is_refused() -> None:
    with pytest.raises(InvalidConfig, match=r"grader\.pattern: .*not a regular expression"):
        Grader.of({"type": "regex", "pattern": "("})


# ---- numeric_answer ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("He has 3 apples, then 5.", [3, 5]),
        ("$1,234.50 and 1,23", [1234.5, 1, 23]),
        ("-4 and +2 and 7-3", [-4, 2, 7, 3]),
        ("GPT-4 at 50%", [4, 50]),
        ("1e3 .5", [1000, 0.5]),
        ("none at all - , . %", []),
        ("1e999", []),
    ],
)
def test_numbers_of_a_text(text: str, found: list[float]) -> None:
    assert numbers(text) == found


def test_the_answer_is_after_the_marker_or_the_last_number() -> None:
    assert answer("3 + 4 = 7\n#### 7 apples, 8 pears", "####") == 7
    assert answer("#### 1 #### 2", "####") == 2
    assert answer("#### none", "####") is None
    assert answer("3 + 4 = 7.", "####") == 7
    assert answer("7 #### 8", None) == 8


@pytest.mark.parametrize(
    ("text", "more", "expected"),
    [
        ("so it is 72", {}, 1.0),
        ("#### 72.0", {}, 1.0),
        ("#### 73", {"incorrect": -1}, -1.0),
        ("I do not know", {"unparsable": -2}, -2.0),
        ("so it is 72", {"marker_required": True, "unparsable": -2}, -2.0),
        ("so it is 71.9", {"tolerance": 0.01}, 1.0),
    ],
)
def test_numeric_answer(text: str, more: dict[str, Any], expected: float) -> None:
    item = {"answer": "48 / 2 = 24\n48 + 24 = 72\n#### 72"}
    given = {"type": "numeric_answer", "reference": "{{ item.answer }}", **more}
    assert score(text, item, **given) == expected


def test_a_reference_without_a_number_is_the_callers_to_fix() -> None:
    with pytest.raises(InvalidData, match="reference holds no number"):
        score("7", {"answer": "seven"}, type="numeric_answer", reference="{{ item.answer }}")


# ---- label_match, numeric_distance, token_overlap ----------------------------------------------

NLI = {"type": "label_match", "labels": ["entailment", "not_entailment"], "close_marker": "</v>"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" entailment</v>", 1),
        ("Entailment </v> because", 1),
        ("not_entailment</v>", -1),
        ("entailment", -3),  # nothing closes it
        ("entailment or not_entailment</v>", -3),
        ("entailment, entailment</v>", 1),
        ("perhaps</v> entailment</v>", -3),
        ("nonentailment</v>", -3),
        ("</v>", -3),
    ],
)
def test_label_match(text: str, expected: float) -> None:
    assert score(text, {"label": "entailment"}, **NLI) == expected


def test_the_verdict_comes_after_an_opening_marker_if_there_is_one() -> None:
    given = {**NLI, "open_marker": "<v>"}
    item = {"label": "entailment"}
    assert score("not_entailment? <v>entailment</v>", item, **given) == 1
    assert score("entailment</v>", item, **given) == -3


def test_the_longest_of_overlapping_labels_counts() -> None:
    given = {"type": "label_match", "labels": ["good", "very good", "bad"]}
    assert score("very good", {"label": "very good"}, **given) == 1
    assert score("good", {"label": "very good"}, **given) == -1


def test_a_gold_label_that_is_not_listed_is_the_callers_to_fix() -> None:
    with pytest.raises(InvalidData, match="none of the grader's 2 labels"):
        score("x", {"label": "neutral"}, **NLI)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("3.5", 2.0), ("about 4 of 5", 2.5), ("0", -1.5), ("five", -2.5), ("6", -2.5), ("-1", -2.5)],
)
def test_numeric_distance(text: str, expected: float) -> None:
    assert score(text, {"label": 4}, type="numeric_distance") == expected


def test_token_overlap_is_squads_f1() -> None:
    given = {"type": "token_overlap"}
    # 2 of 3 words are right, 2 of 2 are found: F1 = 2 * (2/3) * 1 / (2/3 + 1) = 0.8.
    assert score("The tall Eiffel tower!", {"answer": "Eiffel Tower"}, **given) == pytest.approx(
        0.8
    )
    assert score("Rome", {"answer": "Eiffel Tower"}, **given) == 0.0
    exact = {**given, "measure": "exact_match"}
    assert score("the EIFFEL tower.", {"answer": "Eiffel Tower"}, **exact) == 1.0


# ---- multi -------------------------------------------------------------------------------------


def test_multi_reckons_with_its_parts_and_keeps_them() -> None:
    given = {
        "type": "multi",
        "graders": {
            "right": {"type": "string_check", "operation": "like", "reference": "{{ item.a }}"},
            "form": {"type": "regex", "pattern": "^.{1,9}$"},
        },
        "calculate_output": "0.75 * right + 0.25 * form",
    }
    grade = graded("the answer is 7", {"a": "7"}, **given)
    assert grade.reward == 0.75
    assert grade.parts == {"right": 1.0, "form": 0.0}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"calculate_output": "right + wrong"}, "no grader 'wrong'; known: right"),
        ({"calculate_output": "right +"}, "ends too early"),
        ({"graders": {"a b": {"type": "regex", "pattern": "x"}}}, "cannot stand in a formula"),
        ({"graders": {"right": {"type": "string_chek"}}}, "did you mean 'string_check'"),
        ({"graders": {"right": {"type": "regex"}}}, "grader.pattern: field required"),
    ],
)
def test_multi_refuses_what_does_not_fit_together(change: dict[str, Any], words: str) -> None:
    given = {
        "type": "multi",
        "graders": {"right": {"type": "regex", "pattern": "x"}},
        "calculate_output": "right",
    }
    with pytest.raises(InvalidConfig, match=words):
        Grader.of({**given, **change})


def test_multi_holds_no_other_multi() -> None:
    inner = {"type": "multi", "graders": {}, "calculate_output": "1"}
    outer = {"graders": {"a": inner}, "calculate_output": "a"}
    with pytest.raises(ValidationError):
        catalogue.find("rewards", "multi").Config.model_validate(outer)


def test_a_formula_without_a_value_scores_nothing_and_says_why() -> None:
    given = {
        "type": "multi",
        "graders": {"a": {"type": "regex", "pattern": "x"}},
        "calculate_output": "1 / a",
    }
    assert graded("y", **given) == Grade(
        0.0, {"a": 0.0}, "calculate_output: float division by zero"
    )


# ---- the shelf ---------------------------------------------------------------------------------


def test_openai_calls_a_grader_by_its_name() -> None:
    assert Grader.of({"type": "regex", "name": "form", "pattern": "x"}).name == "form"
    assert Grader.of({"type": "regex", "pattern": "x"}).name == "regex"


def test_rows_are_checked_before_anything_is_graded() -> None:
    grader = Grader.of({"type": "string_check", "reference": "{{ item.answer }}"})
    with pytest.raises(InvalidData, match=r"row 1: .*item.answer; the row has messages"):
        grader.check([{"answer": "x"}, {"messages": []}])


@pytest.mark.parametrize("name", sorted(catalogue.entries("rewards")))
def test_every_example_grades_and_names_all_it_reads(name: str) -> None:
    item = {"reference": "7", "label": "spam", "answer": "7", "score": 2}
    grader = Grader.of(catalogue.find("rewards", name).example)
    grader.check([item])
    grades = grader.grade([Sample(item, text) for text in ("7", "spam", "2", "<think></think>x")])
    assert len({grade.reward for grade in grades}) >= 2
    for source in grader.templates():
        for path in ("item.reference", "item.label", "item.answer", "item.score"):
            if path in source:
                with pytest.raises(InvalidData):
                    grader.check([{}])
