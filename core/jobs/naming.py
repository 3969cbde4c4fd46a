"""Names of what jobs make: `ft:<base>:<project>:<suffix>:<id>`, with `:ckpt-step-<n>` behind."""

from __future__ import annotations

PREFIX = "ft:"


def model_name(base: str, project: str, suffix: str | None, job: str) -> str:
    """A job's fine-tuned model. The suffix may be empty, as OpenAI's names have it.

    Args:
        project: the project's name.
        job: the job's public id; its random part ends the name.
    """
    return f"{PREFIX}{base}:{project}:{suffix or ''}:{job.removeprefix('ftjob-')}"


def checkpoint_name(model: str, step: int) -> str:
    """One checkpoint of that model."""
    return f"{model}:ckpt-step-{step}"
