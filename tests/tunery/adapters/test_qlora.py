"""QLoRA: what it asks of the machine, and, on one that has it, that it trains."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tunery.adapters.qlora import Qlora, QloraConfig
from tunery.errors import BaseModelUnavailable, NotSupported, UnsupportedCombination
from tunery.models.shape import shape_of
from tunery.request import parse_request
from tunery.resolve import DeviceFacts, resolve
from tunery.spec import DataFile
from tunery.training.types import AdapterRun

CONFIG = LlamaConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    vocab_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
)
IDS = torch.arange(1, 17)[None]


def test_another_device_is_refused() -> None:
    with pytest.raises(NotSupported, match="trains on CUDA devices, and this is 'cpu'") as caught:
        Qlora().load_options(QloraConfig(), torch.device("cpu"), torch.float32)
    assert caught.value.hint == "use lora here"


def test_a_machine_without_bitsandbytes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(NotSupported, match="bitsandbytes, which is not installed"):
        Qlora().load_options(QloraConfig(), torch.device("cuda"), torch.bfloat16)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"init_lora_weights": "pissa"}, "these are fixed"),
        ({"loftq": True, "quantization": "int8"}, "4 bits"),
        ({"loftq": True, "use_dora": True}, "without rank_pattern"),
    ],
)
def test_contradictions_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QloraConfig(**config)


def test_it_counts_as_lora_and_takes_less_for_the_base() -> None:
    shape = shape_of(CONFIG.to_dict()).model_copy(update={"num_labels": None})
    # q 64->64, k and v 64->32, o 64->64, gate, up and down 64 and 128.
    assert Qlora().trainable_parameters(QloraConfig(r=2), shape) == 2 * 2 * (256 + 192 + 576)
    assert Qlora().weight_bytes(QloraConfig()) == 0.5
    assert Qlora().weight_bytes(QloraConfig(quantization="int8")) == 1.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(CONFIG).save_pretrained(tmp_path)
    return tmp_path


def loaded(folder: Path, config: QloraConfig) -> tuple[Any, Any]:
    """Quantised base's logits, and the model with the fresh adapter."""
    device = torch.device("cuda")
    options = Qlora().load_options(config, device, torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)
    with torch.no_grad():
        logits = base(IDS.to(device)).logits.float()
    return logits, Qlora().apply(config, AdapterRun(base, "CAUSAL_LM", None, 7, "example/base"))  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_it_starts_as_the_quantised_base_and_learns(folder: Path, quantization: Any) -> None:
    config = QloraConfig(r=4, quantization=quantization)
    before, model = loaded(folder, config)
    ids = IDS.to("cuda")
    torch.testing.assert_close(model(ids).logits.float(), before, atol=1e-2, rtol=1e-2)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("alpha", [8, 32])
def test_loftq_starts_nearer_to_the_base_that_was_quantised(folder: Path, alpha: int) -> None:
    base = LlamaForCausalLM.from_pretrained(folder).to("cuda")
    with torch.no_grad():
        wanted = base(IDS.to("cuda")).logits
        quantised, model = loaded(folder, QloraConfig(r=32, lora_alpha=alpha, loftq=True))
        started = model(IDS.to("cuda")).logits.float()
    assert (started - wanted).norm() < 0.7 * (quantised - wanted).norm()


@pytest.mark.gpu
def test_loftq_needs_the_bases_weights(folder: Path) -> None:
    config = QloraConfig(r=4, loftq=True)
    options = Qlora().load_options(config, torch.device("cuda"), torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)
    (folder / "model.safetensors").unlink()
    with pytest.raises(BaseModelUnavailable, match="not among its safetensors"):
        Qlora().apply(config, AdapterRun(base, "CAUSAL_LM", None, 7, "example/base"))  # type: ignore[arg-type]


def resolved(kind: Any, adapter: str = "qlora") -> Any:
    body = {
        "model": "org/base",
        "training_file": "file-1",
        "method": {"type": "supervised", "supervised": {"adapter": {"type": adapter}}},
    }
    file = DataFile(file_id="file-1", sha256="0" * 64, format="chat", rows=9, size_bytes=900)
    shape = shape_of(CONFIG.to_dict(), parameters=1_000_000).model_copy(update={"num_labels": None})
    devices = DeviceFacts(kind=kind, bf16=kind == "cuda")
    return resolve(parse_request(body), training=file, shape=shape, seed=1, devices=devices)


def test_a_request_is_refused_where_the_workers_have_no_gpu() -> None:
    with pytest.raises(UnsupportedCombination, match="trains on cuda, and the workers offer cpu"):
        resolved("cpu")
    quantised = resolved("cuda").estimate["gpu"]["memory_bytes_needed"]
    whole = resolved("cuda", "lora").estimate["gpu"]["memory_bytes_needed"]
    assert whole - quantised == 1_000_000 * 3 // 2
