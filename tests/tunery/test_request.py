"""The shape of a create request: OpenAI's, ours, and what is refused by path."""

from __future__ import annotations

from typing import Any

import pytest

from tunery.errors import InvalidConfig
from tunery.request import parse_request

STOCK = {"model": "org/base", "training_file": "file-1"}


def test_a_stock_request_is_supervised_with_nothing_else_said() -> None:
    request = parse_request(STOCK)

    assert request.method.type == "supervised"
    assert request.method.hyperparameters == {}
    assert request.method.adapter == {}


def test_legacy_hyperparameters_reach_the_method() -> None:
    request = parse_request({**STOCK, "hyperparameters": {"n_epochs": 2}})

    assert request.method.hyperparameters == {"n_epochs": 2}


def test_the_methods_own_hyperparameters_win_over_the_legacy_ones() -> None:
    method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 4}}}

    request = parse_request({**STOCK, "hyperparameters": {"n_epochs": 2}, "method": method})

    assert request.method.hyperparameters == {"n_epochs": 4}


def test_explicit_nulls_mean_the_default() -> None:
    body = {**STOCK, "suffix": None, "validation_file": None, "method": None, "ext": None}

    assert parse_request(body) == parse_request(STOCK)


def test_a_top_level_key_of_a_newer_client_is_noted_not_refused() -> None:
    assert parse_request({**STOCK, "service_tier": "flex"}).ignored == ("service_tier",)


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"model": None}, "model", "missing_parameter"),
        ({"training_file": 7}, "training_file", "invalid_value"),
        ({"suffix": "x" * 65}, "suffix", "invalid_value"),
        ({"seed": -1}, "seed", "invalid_value"),
        ({"seed": 2**31}, "seed", "invalid_value"),
        ({"method": {}}, "method.type", "missing_parameter"),
        ({"method": []}, "method", "invalid_value"),
        ({"method": {"type": "dpo", "supervised": {}}}, "method.supervised", "unknown_parameter"),
        ({"method": {"type": "dpo", "dpo": {"lora": {}}}}, "method.dpo.lora", "unknown_parameter"),
        ({"method": {"type": "dpo", "dpo": {"adapter": 3}}}, "method.dpo.adapter", "invalid_value"),
        ({"ext": {"compute": {"gpu": 2}}}, "ext.compute.gpu", "unknown_parameter"),
        ({"ext": {"compute": {"gpus": 0}}}, "ext.compute.gpus", "invalid_value"),
        ({"ext": {"atempts": 2}}, "ext.atempts", "unknown_parameter"),
        (
            {"ext": {"checkpoints": {"every_steps": "x"}}},
            "ext.checkpoints.every_steps",
            "invalid_value",
        ),
        ({"metadata": {"k": 1}}, "metadata.k", "invalid_value"),
        ({"metadata": {str(i): "v" for i in range(17)}}, "metadata", "invalid_value"),
    ],
)
def test_a_wrong_field_is_named_by_its_path(change: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        parse_request({**STOCK, **change})

    assert (caught.value.param, caught.value.code) == (param, code)


def test_an_unknown_key_is_answered_with_the_nearest_known_one() -> None:
    with pytest.raises(InvalidConfig) as caught:
        parse_request({**STOCK, "ext": {"evaluation": {"every_step": 5}}})

    assert caught.value.hint == "did you mean 'every_steps'?"


def test_all_findings_are_listed_not_only_the_first() -> None:
    with pytest.raises(InvalidConfig) as caught:
        parse_request({**STOCK, "seed": -1, "suffix": ""})

    assert {problem["path"] for problem in caught.value.problems} == {"seed", "suffix"}


@pytest.mark.parametrize("body", [None, [], "x", 3])
def test_a_body_that_is_no_object_is_refused(body: Any) -> None:
    with pytest.raises(InvalidConfig):
        parse_request(body)
