"""Text classification with an encoder and a decoder: encoding, losses, labels, refusals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from tunery import catalogue
from tunery.errors import BaseModelUnavailable, InvalidConfig, InvalidData
from tunery.tasks.text_classification import TextClassification
from tunery.training.types import (
    AdapterRun,
    Document,
    EncodeOptions,
    Evaluated,
    Example,
    MethodRun,
    Outcome,
)

LABELS = ("ham", "spam", "unsure")
WORDS = ["<pad>", "<eos>", "[CLS]", "[SEP]", "[UNK]", "win", "a", "prize", "see", "you", "now"]
ROWS = [
    {"text": "win a prize now now now", "label": "spam"},
    {"text": "see you", "label": "ham"},
    {"text": "see a prize you win", "label": "unsure"},
]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": len(WORDS),
}
OPTIONS = EncodeOptions(format="classification", max_length=16, labels=LABELS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    llama = LlamaConfig(**SIZES, num_key_value_heads=2, eos_token_id=1, bos_token_id=None)
    LlamaForCausalLM(llama).save_pretrained(root / "decoder")
    BertModel(BertConfig(**SIZES, pad_token_id=0)).save_pretrained(root / "encoder")
    return {"decoder": root / "decoder", "encoder": root / "encoder"}


def tokenizer_for(kind: str, pad: str = "<pad>") -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if kind == "encoder":
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=pad, eos_token="<eos>")


runtime = TextClassification().runtime


def load(folder: Path, labels: Any = LABELS) -> Any:
    torch.manual_seed(1)
    return runtime(None).load_model(folder, dtype=torch.float32, labels=labels)


def examples(kind: str, rows: Any = ROWS, options: EncodeOptions = OPTIONS) -> list[Any]:
    tokenizer = tokenizer_for(kind)
    return [runtime(None).encode(row, tokenizer, options, i) for i, row in enumerate(rows)]


def run() -> MethodRun:
    return MethodRun(runtime(None), lambda *_: None, None, 0)  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_the_loss_is_that_of_transformers_summed(kind: str, folders: dict[str, Path]) -> None:
    task = runtime(None)
    model = load(folders[kind])
    batch = task.collate(examples(kind), layout="rows", pad_id=0)
    model.config.pad_token_id = 0
    with torch.no_grad():
        ours = task.supervised_loss(model, batch, run())
        theirs = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.targets
        )
    assert ours.loss.item() / len(ROWS) == pytest.approx(theirs.loss.item(), abs=1e-6)
    assert torch.equal(ours.outcomes["scores"].argmax(1), theirs.logits.argmax(1))
    correct, count = ours.sums["accuracy"]
    assert correct.item() == (theirs.logits.argmax(1) == torch.tensor([1, 0, 2])).sum().item()
    assert count.item() == 3


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize("adapter", ["full", "lora", "ia3", "prompt"])
def test_padding_changes_no_example(kind: str, adapter: str, folders: dict[str, Path]) -> None:
    task = runtime(None)
    entry = catalogue.find("adapters", adapter)
    base = load(folders[kind])
    made = AdapterRun(base, task.peft_task_type, tokenizer_for(kind), 0, "example/base")
    model = entry.apply(entry.Config(), made).eval()
    rows = examples(kind)
    with torch.no_grad():
        together = task.logits(model, task.collate(rows, layout="rows", pad_id=0))
        alone = [task.logits(model, task.collate([r], layout="rows", pad_id=0)) for r in rows]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_a_text_that_ends_with_the_pad_token_is_read_to_its_end(folders: dict[str, Path]) -> None:
    """transformers itself would read the token before, taking the last one for padding."""
    task = runtime(None)
    model = load(folders["decoder"])
    model.config.pad_token_id = 1
    batch = task.collate(
        examples("decoder", [{"text": "see you <eos>", "label": "ham"}, ROWS[0]]),
        layout="rows",
        pad_id=1,
    )
    with torch.no_grad():
        every = model.score(model.model(batch.input_ids, attention_mask=batch.attention_mask)[0])
        ours = task.logits(model, batch)
    torch.testing.assert_close(ours[0], every[0, 2])


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_label_names_are_saved_with_the_model(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    load(folders[kind]).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["id2label"] == {"0": "ham", "1": "spam", "2": "unsure"}
    assert saved["label2id"] == {"ham": 0, "spam": 1, "unsure": 2}
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert again.config.num_labels == 3


def test_texts_keep_their_frame_when_cut() -> None:
    short = EncodeOptions(format="classification", max_length=4, labels=LABELS)
    (cut,) = examples("encoder", ROWS[:1], short)
    assert [WORDS[i] for i in cut.documents[0].input_ids] == ["[CLS]", "win", "a", "[SEP]"]
    assert cut.target == 1
    assert cut.documents[0].supervised == 0


def test_numbers_are_labels_by_their_name() -> None:
    options = EncodeOptions(format="classification", max_length=16, labels=("1", "2", "5"))
    (five,) = examples("decoder", [{"text": "you", "label": 5}], options)
    assert five.target == 2


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"text": "you", "label": "other"}, "unknown_label"),
        ({"text": "", "label": "ham"}, "empty_text"),
    ],
)
def test_rows_that_cannot_be_learnt_are_named_and_not_quoted(row: Any, code: str) -> None:
    with pytest.raises(InvalidData, match="row 1: ") as caught:
        examples("decoder", [ROWS[0], row])
    assert caught.value.code == code
    assert "other" not in caught.value.message


def test_one_label_is_not_a_choice(folders: dict[str, Path]) -> None:
    with pytest.raises(InvalidConfig, match="two labels or more, the data has 1"):
        load(folders["encoder"], ("only",))


def test_a_folder_without_a_model_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(BaseModelUnavailable):
        load(tmp_path)


def evaluated(targets: list[int], scores: list[list[float]]) -> Evaluated:
    nothing = np.zeros(0, np.int32)
    outcomes = [
        Outcome(
            Example((Document(nothing, nothing),), target, -1 - row),
            {"scores": np.array(said, np.float32)},
        )
        for row, (target, said) in enumerate(zip(targets, scores, strict=True))
    ]
    return Evaluated(0.5, outcomes=outcomes, labels=("no", "yes"))


def test_predictions_name_row_labels_and_probabilities() -> None:
    (row,) = runtime(None).predictions(evaluated([1], [[0.0, np.log(3.0)]]))
    assert row == {
        "row": 0,
        "prediction": "yes",
        "label": "yes",
        "probabilities": {"no": 0.25, "yes": 0.75},
    }


def test_metrics_by_hand() -> None:
    names = ["loss", "accuracy", "macro_f1", "weighted_f1", "unknown"]
    seen = evaluated([0, 0, 1], [[2, 1], [0, 1], [0, 4]])
    values = runtime(None).metrics(names, seen)
    assert values == {
        "loss": 0.5,
        "accuracy": pytest.approx(2 / 3),
        "macro_f1": pytest.approx(2 / 3),
        "weighted_f1": pytest.approx(2 / 3),
    }


@pytest.mark.parametrize(
    ("kind", "adapter", "rate"), [("encoder", "full", 1e-3), ("decoder", "lora", 1e-2)]
)
def test_training_learns_the_labels(
    kind: str, adapter: str, rate: float, folders: dict[str, Path]
) -> None:
    task = runtime(None)
    entry = catalogue.find("adapters", adapter)
    base = load(folders[kind])
    made = AdapterRun(base, task.peft_task_type, tokenizer_for(kind), 0, "example/base")
    model = entry.apply(entry.Config(), made)
    batch = task.collate(examples(kind), layout="rows", pad_id=0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(120):
        optimizer.zero_grad()
        task.supervised_loss(model, batch, run()).loss.backward()
        optimizer.step()
    with torch.no_grad():
        out = task.supervised_loss(model.eval(), batch, run())
    assert out.outcomes["scores"].argmax(1).tolist() == [1, 0, 2]
