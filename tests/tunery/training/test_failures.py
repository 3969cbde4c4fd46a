from __future__ import annotations

import pytest
import torch

from tunery.errors import InvalidData, NonFiniteLoss, OutOfMemory, StoreUnavailable
from tunery.training.failures import failure


@pytest.mark.parametrize(
    ("error", "code", "category", "retryable"),
    [
        (InvalidData("row 3"), "invalid_training_file", "user_data", False),
        (NonFiniteLoss("step 4"), "non_finite_loss", "user_config", False),
        (OutOfMemory("no"), "out_of_memory", "capacity", False),
        (StoreUnavailable("away"), "artifact_store_error", "platform", True),
        (torch.OutOfMemoryError("secret"), "out_of_memory", "capacity", False),
        (RuntimeError("CUDA error: secret"), "cuda_error", "platform", True),
        (RuntimeError("[gloo] Connection closed by peer secret"), "worker_lost", "platform", True),
        (torch.distributed.DistBackendError("secret"), "worker_lost", "platform", True),
        (OSError("secret"), "internal_error", "platform", True),
        (KeyError("secret"), "internal_error", "unknown", False),
    ],
)
def test_a_failure_has_a_code_a_culprit_and_no_foreign_words(
    error: BaseException, code: str, category: str, retryable: bool
) -> None:
    event = failure("ftjob-1", error, 4)
    assert (event.code, event.category, event.retryable) == (code, category, retryable)
    assert event.step == 4
    assert "secret" not in event.model_dump_json()
