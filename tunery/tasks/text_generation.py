"""Text generation: the next token, by causal language models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from tunery.entries import EntryConfig, Task
from tunery.errors import BaseModelUnavailable
from tunery.evaluation.language import perplexity

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tunery.training.types import (
        Batch,
        EncodeOptions,
        Evaluated,
        Example,
        Layout,
        LossOutput,
        MethodRun,
        TaskRuntime,
    )


class TextGenerationConfig(EntryConfig):
    """Nothing to set: what is learnt is the method's business, how rows read the transforms'."""


class TextGeneration:
    name: ClassVar[str] = "text-generation"
    title: ClassVar[str] = "Text generation"
    summary: ClassVar[str] = "Chat, completion and plain text, by a causal language model."
    paper: ClassVar[str | None] = None
    Config: ClassVar[type[EntryConfig]] = TextGenerationConfig
    example: ClassVar[Mapping[str, Any]] = {"type": "text-generation"}
    formats: ClassVar[frozenset[str]] = frozenset(
        {"chat", "prompt_completion", "text", "preference", "unpaired_preference", "prompt"}
    )
    metrics: ClassVar[tuple[str, ...]] = ("loss", "perplexity", "token_accuracy")
    default_metrics: ClassVar[tuple[str, ...]] = ("loss", "token_accuracy")
    example_row: ClassVar[Mapping[str, Any]] = {
        "messages": [
            {"role": "user", "content": "Name a prime above ten."},
            {"role": "assistant", "content": "Eleven."},
        ]
    }

    def runtime(self, config: Any) -> TaskRuntime:
        return Runtime()


class Runtime:
    """Documents of tokens in, losses of their supervised tokens out."""

    smooths_labels = True
    peft_task_type: str | None = "CAUSAL_LM"
    layouts: frozenset[Layout] = frozenset({"rows", "packed"})

    def load_model(
        self, path: Path, *, dtype: torch.dtype, labels: tuple[str, ...] | None, **options: Any
    ) -> PreTrainedModel:
        """The causal language model in `path`, from safetensors, running none of its code."""
        from transformers import AutoModelForCausalLM

        try:
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                **options,
            )
        except (OSError, ValueError) as error:
            raise BaseModelUnavailable(
                f"no causal language model could be loaded ({type(error).__name__})",
                hint="import the base model again; `tunery models list` shows what is there",
            ) from error
        model.train(False)
        return model

    def encode(
        self,
        row: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        options: EncodeOptions,
        index: int,
    ) -> Example:
        from tunery.training.encoding import encode_row

        return encode_row(row, tokenizer, options, index)

    def collate(self, examples: Sequence[Example], *, layout: Layout, pad_id: int) -> Batch:
        from tunery.training.collate import collate

        return collate(examples, layout=layout, pad_id=pad_id)

    def units(self, example: Example) -> float:
        """Supervised tokens, each times its weight."""
        return sum(document.weighted for document in example.documents)

    def supervised_loss(self, model: nn.Module, batch: Batch, run: MethodRun) -> LossOutput:
        """Sum of the weighted negative log-likelihoods, and token accuracy."""
        from tunery.training.types import LossOutput

        smoothing = run.label_smoothing if model.training else 0.0
        losses = run.token_losses(model, batch, label_smoothing=smoothing)
        weighted = losses.nll if batch.target_weights is None else losses.nll * batch.target_weights
        count = losses.correct.new_full((), batch.supervised)
        return LossOutput(
            loss=weighted.sum(), sums={"mean_token_accuracy": (losses.correct.sum(), count)}
        )

    def export_files(self) -> Mapping[str, Any]:
        """None: transformers' own files say it all."""
        return {}

    def outcomes(
        self, model: nn.Module, batch: Batch, out: LossOutput, names: Sequence[str]
    ) -> dict[str, Tensor]:
        return out.outcomes

    def metrics(self, names: Sequence[str], seen: Evaluated) -> dict[str, float]:
        """`loss` as the method defines it; perplexity is exp of nats per token; accuracy in 0..1.

        Without token accuracy the loss is not a likelihood (DPO's, say) and has no perplexity.
        """
        known = {"loss": seen.loss}
        if "mean_token_accuracy" in seen.sums:
            known["perplexity"] = perplexity(seen.loss)
            known["token_accuracy"] = seen.sums["mean_token_accuracy"]
        return {name: known[name] for name in names if name in known}

    def predictions(self, seen: Evaluated) -> Iterator[dict[str, Any]]:
        """None: what is scored is the likelihood of given answers."""
        return iter(())


ENTRY: type[Task] = TextGeneration
