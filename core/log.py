"""What every process of the service logs like: one JSON object a line, secrets struck out."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import structlog

if TYPE_CHECKING:
    from collections.abc import MutableMapping

STRUCK: Final = "[secret]"
# Our keys, hub tokens, webhook secrets, AWS key ids, and passwords in URLs.
_SECRET: Final = re.compile(
    r"\bft_[0-9A-Za-z]{8,}_[0-9A-Za-z]{20,}"
    r"|\bhf_[0-9A-Za-z]{20,}"
    r"|\bwhsec_[0-9A-Za-z+/=]{16,}"
    r"|\bAKIA[0-9A-Z]{16}"
    r"|(?<=://)[^/@\s:]*:[^/@\s]+(?=@)"
)


def redact(text: str) -> str:
    """The text without what looks like a secret."""
    return _SECRET.sub(STRUCK, text)


def _struck_out(logger: Any, method: str, event: MutableMapping[str, Any]) -> Any:
    for key, value in event.items():
        if isinstance(value, str):
            event[key] = redact(value)
    return event


def configure() -> None:
    """Set this process's logging up. Tracebacks carry no values of variables."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            _struck_out,
            structlog.processors.JSONRenderer(default=str),
        ],
        logger_factory=structlog.PrintLoggerFactory(),
        cache_logger_on_first_use=False,
    )
