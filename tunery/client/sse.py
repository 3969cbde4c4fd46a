"""Server-sent events, read line by line."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Message:
    """One event of a stream."""

    data: str
    id: str | None


class Parser:
    """Lines in, messages out; remembers the last id for a reconnect."""

    def __init__(self) -> None:
        self.last_id: str | None = None
        self._data: list[str] = []
        # An id counts once its event is whole: half an event must be sent again.
        self._id: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        """What a request for the rest of the stream carries."""
        resume = {} if self.last_id is None else {"last-event-id": self.last_id}
        return {"accept": "text/event-stream", **resume}

    def feed(self, line: str) -> Message | None:
        """A line without its end; a message when this line, an empty one, ends it."""
        if not line:
            return self._finish()
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "id" and "\0" not in value:
            self._id = value
        return None

    def reset(self) -> None:
        """Forget half a message: the connection broke, the server will send it again."""
        self._data, self._id = [], self.last_id

    def _finish(self) -> Message | None:
        if not self._data:
            return None
        self.last_id = self._id
        message = Message("\n".join(self._data), self.last_id)
        self._data = []
        return message
