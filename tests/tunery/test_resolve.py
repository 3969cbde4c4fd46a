"""What a request becomes: nothing left open, everything accounted for, nonsense refused."""

from __future__ import annotations

from typing import Any

import pytest

from tunery.entries import ModelShape
from tunery.errors import AppError, InvalidConfig, UnsupportedCombination
from tunery.methods.supervised import SupervisedConfig
from tunery.request import parse_request
from tunery.resolve import DeviceFacts, Resolved, resolve, total_steps
from tunery.spec import DataFile, TrainingSpec

SHAPE = ModelShape(
    architecture="LlamaForCausalLM",
    model_type="llama",
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=512,
    max_position_embeddings=512,
    linear_shapes={"q_proj": (64, 64), "v_proj": (64, 32)},
    parameters=200_000,
)


def data(
    format: Any = "chat",
    rows: int = 100,
    labels: tuple[str, ...] | None = None,
    sha256: str = "0" * 64,
) -> DataFile:
    return DataFile(
        file_id="file-train",
        sha256=sha256,
        format=format,
        rows=rows,
        size_bytes=rows * 400,
        labels=labels,
    )


def resolved(
    training: DataFile | None = None,
    validation: DataFile | None = None,
    devices: DeviceFacts | None = None,
    **body: Any,
) -> Resolved:
    request = parse_request({"model": "org/base", "training_file": "file-train", **body})
    return resolve(
        request,
        training=training or data(),
        validation=validation,
        shape=SHAPE,
        seed=5,
        devices=devices,
    )


def method(**hyperparameters: Any) -> dict[str, Any]:
    return {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}


def refusal(**kwargs: Any) -> AppError:
    with pytest.raises((InvalidConfig, UnsupportedCombination)) as caught:
        resolved(**kwargs)
    return caught.value


def test_a_stock_request_on_chat_data_is_supervised_lora_on_text_generation() -> None:
    spec = resolved().spec

    names = (spec.task.type, spec.method.type, spec.adapter.type)
    assert names == ("text-generation", "supervised", "lora")
    assert [use.type for use in spec.transforms] == ["chat_template"]


def test_the_task_follows_from_the_data() -> None:
    found = resolved(training=data("classification", labels=("b", "a")))

    assert found.spec.task.type == "text-classification"
    assert found.spec.data.training.labels == ("a", "b")


def test_a_spec_survives_json_and_has_nothing_auto() -> None:
    spec = resolved().spec

    assert TrainingSpec.model_validate_json(spec.model_dump_json()) == spec
    assert '"auto"' not in resolved(devices=DeviceFacts()).spec.model_dump_json()


def test_auto_and_null_mean_the_same_as_saying_nothing() -> None:
    said = resolved(
        method=method(n_epochs="auto", batch_size=None, learning_rate_multiplier="auto")
    )

    assert said.spec == resolved().spec


def test_a_value_of_the_request_is_kept_and_named_as_such() -> None:
    found = resolved(method=method(batch_size=3))

    assert found.spec.method.config["batch_size"] == 3
    assert found.sources["method.config.batch_size"] == "request"
    assert found.sources["method.config.weight_decay"] == "default"
    assert "lora" in found.sources["method.config.learning_rate"]


def test_the_multiplier_multiplies_the_adapters_default_rate() -> None:
    plain, double = resolved(), resolved(method=method(learning_rate_multiplier=2))

    rate = plain.spec.method.config["learning_rate"]
    assert double.spec.method.config["learning_rate"] == pytest.approx(2 * rate)
    assert double.hyperparameters["learning_rate_multiplier"] == pytest.approx(2)


def test_dpo_learns_more_slowly_than_supervised() -> None:
    dpo = resolved(training=data("preference"), method={"type": "dpo"})

    assert dpo.spec.method.config["learning_rate"] < resolved().spec.method.config["learning_rate"]


def test_max_length_follows_the_base_models_context() -> None:
    assert resolved().spec.method.config["max_length"] == 512


def test_the_seed_of_the_request_wins() -> None:
    assert (resolved().spec.seed, resolved(seed=9).spec.seed) == (5, 9)


def test_a_last_smaller_batch_is_a_step() -> None:
    config = resolved(method=method(batch_size=8, n_epochs=2)).spec.method.config
    assert total_steps(SupervisedConfig(**config), rows=17) == 6


@pytest.mark.parametrize(
    ("kwargs", "param", "code"),
    [
        ({"method": {"type": "sft"}}, "method.type", "unsupported_method"),
        (
            {"method": method(n_epoch=3)},
            "method.supervised.hyperparameters.n_epoch",
            "unknown_parameter",
        ),
        (
            {"method": method(n_epochs=0)},
            "method.supervised.hyperparameters.n_epochs",
            "invalid_value",
        ),
        (
            {"method": method(learning_rate=1e-4, learning_rate_multiplier=2)},
            "method.supervised.hyperparameters.learning_rate_multiplier",
            "invalid_value",
        ),
        (
            {"method": method(max_length=1024)},
            "method.supervised.hyperparameters.max_length",
            "invalid_value",
        ),
        (
            {"method": {"type": "supervised", "supervised": {"adapter": {"type": "lorra"}}}},
            "method.supervised.adapter.type",
            "invalid_value",
        ),
        (
            {"method": {"type": "supervised", "supervised": {"adapter": {"rank": 8}}}},
            "method.supervised.adapter.rank",
            "unknown_parameter",
        ),
        ({"training": data("preference")}, "training_file", "unsupported_combination"),
        ({"validation": data("text")}, "validation_file", "unsupported_combination"),
        ({"ext": {"task": "text-classification"}}, "training_file", "unsupported_combination"),
        (
            {"ext": {"compute": {"gpus": 2, "strategy": "single"}}},
            "ext.compute.strategy",
            "unsupported_combination",
        ),
        (
            {
                "method": {"type": "supervised", "supervised": {"adapter": {"type": "prompt"}}},
                "ext": {"compute": {"gpus": 2, "strategy": "deepspeed_zero3"}},
            },
            "ext.compute.strategy",
            "unsupported_combination",
        ),
        (
            {"ext": {"compute": {"strategy": "deepspeed_zero0", "precision": "bf16"}}},
            "ext.compute.strategy",
            "unsupported_combination",
        ),
        (
            {"ext": {"evaluation": {"every_steps": 5}}},
            "ext.evaluation.every_steps",
            "unsupported_combination",
        ),
        ({"ext": {"evaluation": {"metrics": ["bleu"]}}}, "ext.evaluation.metrics", "invalid_value"),
        ({"ext": {"transforms": [{}]}}, "ext.transforms.0.type", "missing_parameter"),
        (
            {"training": data("text"), "ext": {"transforms": [{"type": "chat_template"}]}},
            "ext.transforms.0",
            "unsupported_combination",
        ),
    ],
)
def test_nonsense_is_refused_by_path(kwargs: dict[str, Any], param: str, code: str) -> None:
    error = refusal(**kwargs)

    assert (error.param, error.code) == (param, code)


def test_a_refused_format_is_answered_with_the_methods_that_take_it() -> None:
    assert "dpo" in (refusal(training=data("preference")).hint or "")


def test_two_ranks_train_with_ddp_unless_told_otherwise() -> None:
    assert resolved(ext={"compute": {"gpus": 2}}).spec.compute.strategy == "ddp"


def test_precision_follows_the_device() -> None:
    cuda = DeviceFacts(kind="cuda", bf16=True)

    assert resolved(devices=cuda).spec.compute.precision == "bf16"
    assert resolved(devices=DeviceFacts()).spec.compute.precision == "fp32"


def test_labels_of_both_files_are_numbered_together() -> None:
    found = resolved(
        training=data("classification", labels=("a", "c")),
        validation=data("classification", labels=("b", "c"), sha256="1" * 64),
    )

    assert found.spec.data.validation is not None
    assert found.spec.data.validation.labels == ("a", "b", "c")
    assert [warning["code"] for warning in found.warnings] == ["unseen_labels"]


def test_validating_on_the_training_file_is_warned_about() -> None:
    assert [w["code"] for w in resolved(validation=data()).warnings] == ["train_valid_overlap"]
    assert resolved(validation=data(sha256="1" * 64)).warnings == []


def test_few_rows_are_trained_on_with_a_warning() -> None:
    assert [w["code"] for w in resolved(training=data(rows=9)).warnings] == ["too_few_examples"]
    assert resolved(training=data(rows=10)).warnings == []


def test_an_estimate_says_its_basis_and_counts_adapter_work_as_four_n() -> None:
    lora = resolved(method=method(max_steps=10)).estimate
    full = resolved(
        method={
            "type": "supervised",
            "supervised": {"adapter": {"type": "full"}, "hyperparameters": {"max_steps": 10}},
        }
    ).estimate

    assert lora["basis"] == "modelled"
    assert full["seconds"]["mid"] / lora["seconds"]["mid"] == pytest.approx(1.5)
    # 10 steps of 8 rows of 400 bytes, at 4 bytes a token
    assert lora["train_tokens"] == 8_000
