"""The doorbell: "there may be work for this queue". It carries no truth; Postgres does.

The only module that names Celery outside `worker/`. Nothing here is called inside a request: a
broker that is dead or frozen must not be noticed by anybody who submits a job.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery import Celery
from celery.exceptions import CeleryError
from kombu.entity import Queue
from kombu.exceptions import OperationalError

from tunery.errors import ServiceUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterable

WAKE = "tunery.wake"
"""The one task. Its one argument is a message: `{"v": 1, "class": "<queue>"}`."""
SOCKET_TIMEOUT_S = 5.0

_AWAY = (OperationalError, CeleryError, OSError)


def celery_app(broker_url: str, queues: Iterable[str] = ("default",), **overrides: Any) -> Celery:
    """Celery, set up for tasks that last hours while the truth lies elsewhere.

    Early acknowledgement, no prefetch and no ETA: each alternative was seen to run a long task
    twice. `overrides` are for tests.
    """
    names = list(queues)
    app = Celery("tunery", broker=broker_url, set_as_current=False)
    app.conf.update(
        task_queues=[Queue(name) for name in names],  # type: ignore[no-untyped-call]
        task_default_queue=names[0],
        broker_transport_options={
            # Covers "popped, not started" only. Equal in every application on one broker.
            "visibility_timeout": 3600,
            "unacked_restore_interval": 10,
            "unacked_restore_throttle": 1,
            # Without these a half-open broker blocks for ever.
            "socket_timeout": SOCKET_TIMEOUT_S,
            "socket_connect_timeout": SOCKET_TIMEOUT_S,
            "socket_keepalive": not broker_url.startswith("redis+socket"),
            "health_check_interval": 10,
            "global_keyprefix": "tunery:",
        },
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,  # the default gives up after a hundred
        broker_pool_acquire_timeout=10,  # the default waits for ever
        task_publish_retry=False,  # retrying is the outbox relay's
        task_acks_late=False,  # a lease in Postgres stands in for redelivery
        task_reject_on_worker_lost=False,  # documented to loop
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        worker_concurrency=1,
        worker_cancel_long_running_tasks_on_connection_loss=False,  # the default flips in 6.0
        worker_soft_shutdown_timeout=0,  # draining is the supervisor's
        task_ignore_result=True,
        result_backend=None,  # it would be a second truth
        task_time_limit=None,  # limits are the supervisor's, which can save first
        task_soft_time_limit=None,
        task_serializer="json",
        accept_content=["json"],
        event_serializer="json",
        task_create_missing_queues=False,  # a typo is an error, not a queue nobody reads
        worker_send_task_events=False,
        worker_enable_remote_control=False,
        worker_hijack_root_logger=False,
    )
    app.conf.update(overrides)
    return app


class Broker:
    """Rings the bell. Blocking calls, each bounded by the socket's timeout: run them in a thread.

    Threads may share one.
    """

    def __init__(self, url: str, **overrides: Any) -> None:
        self._app = celery_app(url, **overrides)
        # One try: whoever calls has a schedule of retries of its own.
        self._app.conf.broker_transport_options |= {"max_retries": 1, "interval_start": 0.0}

    def wake(self, queue: str) -> None:
        """Tell the workers of `queue` that there may be work.

        Raises:
            ServiceUnavailable: the broker does not take the message.
        """
        try:
            self._app.send_task(
                WAKE,
                args=[{"v": 1, "class": queue}],
                # A Queue, not a name: which queues exist was checked when the job came in.
                queue=Queue(queue),  # type: ignore[no-untyped-call]
                ignore_result=True,
                retry=False,
            )
        except _AWAY as error:
            raise ServiceUnavailable("the broker does not answer") from error

    def waiting(self, queue: str) -> int:
        """Messages of `queue` that no worker has taken yet.

        Raises:
            ServiceUnavailable: the broker does not answer.
        """
        try:
            with self._app.connection_for_write(connect_timeout=SOCKET_TIMEOUT_S) as connection:
                # Not passive: kombu 5.7 asks for the unprefixed key and would find no queue.
                declared = connection.default_channel.queue_declare(queue, durable=True)
                return int(declared.message_count)
        except _AWAY as error:
            raise ServiceUnavailable("the broker does not answer") from error

    def ping(self) -> None:
        """Ask for an answer.

        Raises:
            ServiceUnavailable: there is none.
        """
        self.waiting("default")

    def close(self) -> None:
        """Close every connection."""
        self._app.close()
