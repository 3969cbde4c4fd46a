"""Tiny random models of several families, and a tokenizer that cuts words into letters."""

from __future__ import annotations

import string
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTModel,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from tunery import catalogue
from tunery.training.checkpoint import export_writer
from tunery.training.losses import TokenLossComputer
from tunery.training.types import AdapterRun, EncodeOptions, MethodRun, examples_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

SPECIALS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "</s>"]
WHOLE = ["the", "in", "of", "is", "a", "lives", "who", "where", "good", "bad"]
LETTERS = [*string.ascii_letters, *string.digits, *".,?!-"]
VOCABULARY = [*SPECIALS, *WHOLE, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": len(VOCABULARY),
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}


HALVES: dict[str, Any] = {
    "d_model": 32,
    **{f"{half}_layers": 2 for half in ("encoder", "decoder")},
    **{f"{half}_attention_heads": 4 for half in ("encoder", "decoder")},
    **{f"{half}_ffn_dim": 48 for half in ("encoder", "decoder")},
}
SPOKEN: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A few words are whole, others are a letter a token; pairs have types 0 and 1."""
    ids = {token: number for number, token in enumerate(VOCABULARY)}
    backend = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        eos_token="</s>",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders by family: weights and tokenizer."""
    root = tmp_path_factory.mktemp("bases")
    t5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    made = {
        "t5": lambda: T5ForConditionalGeneration(
            T5Config(**t5, **SPOKEN, decoder_start_token_id=0, dropout_rate=0.0)
        ),
        "bart": lambda: BartForConditionalGeneration(
            BartConfig(**HALVES, **SPOKEN, decoder_start_token_id=2, dropout=0.0, init_std=0.2)
        ),
        "bert": lambda: BertModel(BertConfig(**SIZES, pad_token_id=0)),
        "roberta": lambda: RobertaModel(RobertaConfig(**SIZES, pad_token_id=0)),
        "llama": lambda: LlamaForCausalLM(
            LlamaConfig(**SIZES, num_key_value_heads=2, eos_token_id=4, bos_token_id=None)
        ),
    }
    for name, make in made.items():
        torch.manual_seed(0)
        make().save_pretrained(root / name)
        make_tokenizer().save_pretrained(root / name)
    return {name: root / name for name in made} | _perceiving(root)


def _perceiving(root: Path) -> dict[str, Path]:
    """Models that see and hear, with how their inputs are prepared."""
    halves = {
        name: SIZES[name] for name in SIZES if name not in ("vocab_size", "max_position_embeddings")
    }
    convolutions = {"conv_dim": (16, 16), "conv_kernel": (10, 8), "conv_stride": (8, 8)}
    spectrogram = {"num_mel_bins": 16, "max_length": 40}
    made: dict[str, Any] = {
        "vit": (
            lambda: ViTModel(ViTConfig(**halves, image_size=16, patch_size=8)),
            ViTImageProcessorPil(size={"height": 16, "width": 16}),
        ),
        "ast": (
            lambda: ASTModel(ASTConfig(**halves, **spectrogram, patch_size=8)),
            ASTFeatureExtractor(**spectrogram),
        ),
        "whisper": (
            lambda: WhisperForConditionalGeneration(
                WhisperConfig(
                    **HALVES,
                    **SPOKEN,
                    num_mel_bins=16,
                    max_source_positions=50,
                    max_target_positions=64,
                    decoder_start_token_id=1,
                    init_std=0.2,
                )
            ),
            WhisperFeatureExtractor(feature_size=16, chunk_length=1),
        ),
        "wav2vec2": (
            lambda: Wav2Vec2Model(
                Wav2Vec2Config(
                    **halves,
                    **convolutions,
                    num_feat_extract_layers=2,
                    num_conv_pos_embeddings=4,
                    num_conv_pos_embedding_groups=2,
                    apply_spec_augment=False,
                    layerdrop=0.0,
                )
            ),
            Wav2Vec2FeatureExtractor(),
        ),
    }
    for name, (make, preparer) in made.items():
        torch.manual_seed(0)
        make().save_pretrained(root / name)
        preparer.save_pretrained(root / name)
    make_tokenizer().save_pretrained(root / "whisper")
    return {name: root / name for name in made}


class Bench:
    """One task, with what it takes to run it by hand."""

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerFast, **config: Any) -> None:
        entry = catalogue.find("tasks", name)
        self.runtime = entry.runtime(entry.Config(**config))
        self.format = sorted(entry.formats)[0]
        self.tokenizer = tokenizer

    def load(self, folder: Path, labels: tuple[str, ...] | None = None) -> Any:
        torch.manual_seed(1)
        return self.runtime.load_model(folder, dtype=torch.float32, labels=labels)

    def encode(
        self, rows: Sequence[Any], labels: tuple[str, ...] | None = None, **options: Any
    ) -> list[Any]:
        given = {"format": self.format, "max_length": 64, "labels": labels, **options}
        chosen = EncodeOptions(**given)
        return [
            example
            for number, row in enumerate(rows)
            for example in examples_of(self.runtime.encode(row, self.tokenizer, chosen, number))
        ]

    def collate(self, examples: Sequence[Any]) -> Any:
        return self.runtime.collate(examples, layout="rows", pad_id=0)

    def run(self, model: Any) -> MethodRun:
        base = model.get_base_model() if hasattr(model, "peft_config") else model
        return MethodRun(self.runtime, TokenLossComputer(base), None, 0)

    def loss(self, model: Any, examples: Sequence[Any]) -> Any:
        return self.runtime.supervised_loss(model, self.collate(examples), self.run(model))

    def adapt(self, model: Any, adapter: str, **config: Any) -> Any:
        entry = catalogue.find("adapters", adapter)
        run = AdapterRun(model, self.runtime.peft_task_type, self.tokenizer, 0, "example/base")
        return entry.apply(entry.Config(**config), run)

    def export(self, model: Any, folder: Path) -> Path:
        """What a run would leave of the model."""
        trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        export_writer(model, trained)(folder)
        return folder

    def learn(
        self, model: Any, examples: Sequence[Any], *, steps: int = 60, rate: float = 1e-3
    ) -> Any:
        """Train on one batch; the loss output afterwards, in eval mode."""
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=rate)
        for _ in range(steps):
            optimizer.zero_grad()
            self.loss(model.train(), examples).loss.backward()
            optimizer.step()
        with torch.no_grad():
            return self.loss(model.eval(), examples)


@pytest.fixture
def bench(tokenizer: PreTrainedTokenizerFast) -> Any:
    """`bench(task, **config)`."""
    return lambda name, **config: Bench(name, tokenizer, **config)
