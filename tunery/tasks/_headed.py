"""What the tasks share that put a head on an encoder, or on a decoder read as one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunery.errors import BaseModelUnavailable, InvalidConfig

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from tunery.training.types import Batch, Example, Layout, LossOutput


def load_headed(
    auto: Any, path: Path, *, what: str, labels: tuple[str, ...] | None = None, **options: Any
) -> PreTrainedModel:
    """The model in `path` with the head of transformers' class `auto`; in eval mode.

    A head that the folder lacks is drawn from torch's default generator. Label names go into the
    model's config.

    Raises:
        BaseModelUnavailable: the folder does not hold a model that can do that.
    """
    if labels is not None:
        options |= {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {name: i for i, name in enumerate(labels)},
        }
    try:
        model: PreTrainedModel = auto.from_pretrained(
            path,
            ignore_mismatched_sizes=True,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            **options,
        )
    except (OSError, ValueError) as error:
        raise BaseModelUnavailable(
            f"no model for {what} could be loaded ({type(error).__name__})",
            hint="import the base model again; `tunery models list` shows what is there",
        ) from error
    if getattr(model.config, "pad_token_id", 0) is None:
        # transformers refuses a batch without one, though only its own pooling would use it.
        model.config.pad_token_id = model.config.eos_token_id or 0
    model.eval()  # type: ignore[no-untyped-call]
    return model


def need_two(labels: tuple[str, ...] | None, task: str) -> tuple[str, ...]:
    """The labels.

    Raises:
        InvalidConfig: fewer than two: there is nothing to tell apart.
    """
    if labels is None or len(labels) < 2:
        raise InvalidConfig(
            f"{task} needs two labels or more, the data has {len(labels or ())}",
            code="too_few_labels",
            param="training_file",
        )
    return labels


class Headed:
    """A runtime whose examples count 1 each, in padded rows with a mask."""

    peft_task_type: str | None = None
    layouts: frozenset[Layout] = frozenset({"rows"})
    smooths_labels: bool = False

    def collate(self, examples: Sequence[Example], *, layout: Layout, pad_id: int) -> Batch:
        from tunery.training.collate import collate

        return collate(examples, layout=layout, pad_id=pad_id, mask=True)

    def units(self, example: Example) -> float:
        """One: the loss is the mean over examples."""
        return 1.0

    def export_files(self) -> Mapping[str, Any]:
        """None: transformers' own files say it all."""
        return {}

    def outcomes(
        self, model: nn.Module, batch: Batch, out: LossOutput, names: Sequence[str]
    ) -> dict[str, Tensor]:
        return out.outcomes
