"""The doorbell, and the two traps of Celery on Redis that its settings avoid.

Real Celery workers, a real broker. Traps: a task that outlasts the visibility timeout is run
again; and a broker that is dead or frozen blocks whoever publishes to it, for ever.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from core.broker import SOCKET_TIMEOUT_S, WAKE, Broker, celery_app
from core.local.broker import EmbeddedBroker
from tunery.errors import ServiceUnavailable

VISIBILITY_S = 2
TASK_S = 7.0

# A worker application of its own, with the product's settings and an impatient broker.
PROGRAM = """
import os, sys, time
from core.broker import WAKE, celery_app

app = celery_app(os.environ["BROKER"])
app.conf.broker_transport_options |= {
    "visibility_timeout": %(visibility)s, "unacked_restore_interval": 0.2,
}
app.conf.update(**%(overrides)r)

@app.task(name=WAKE)
def wake(message):
    with open(os.environ["TRAIL"], "a") as trail:
        trail.write(f"{message['class']}\\n")
    time.sleep(%(seconds)s)
"""


@pytest.fixture
def workers(tmp_path, broker_url):
    """`workers(**overrides)` starts some and returns the file where each run leaves a line."""
    started = []

    def start(count=2, **overrides):
        program = PROGRAM % {
            "visibility": VISIBILITY_S,
            "seconds": TASK_S,
            "overrides": overrides,
        }
        (tmp_path / "trap_app.py").write_text(program)
        trail = tmp_path / "trail"
        trail.touch()
        environment = os.environ | {
            "BROKER": broker_url,
            "TRAIL": str(trail),
            "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])]),
        }
        for number in range(count):
            command = [sys.executable, "-m", "celery", "-A", "trap_app", "worker", "-c", "1"]
            command += ["-P", "prefork", "-n", f"w{number}@here", "-l", "WARNING"]
            command += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
            started.append(
                subprocess.Popen(
                    command,
                    env=environment,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
            )
        return trail

    yield start
    for process in started:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def runs(trail):
    return trail.read_text().split()


def wait_for_runs(trail, count, patience_s):
    deadline = time.monotonic() + patience_s
    while len(runs(trail)) < count and time.monotonic() < deadline:
        time.sleep(0.1)
    return len(runs(trail))


@pytest.mark.slow
def test_a_task_that_outlasts_the_visibility_timeout_runs_once(workers, broker_url):
    trail = workers()
    broker = Broker(broker_url)
    broker.wake("default")
    assert wait_for_runs(trail, 1, 60) == 1
    time.sleep(TASK_S)  # the visibility timeout passes three times
    assert runs(trail) == ["default"]
    broker.close()


@pytest.mark.slow
def test_with_late_acknowledgement_the_same_task_runs_again(workers, broker_url):
    """The trap is real: without this, the test above could not fail."""
    trail = workers(task_acks_late=True)
    broker = Broker(broker_url)
    broker.wake("default")
    assert wait_for_runs(trail, 2, 60) >= 2
    broker.close()


@pytest.mark.slow
def test_a_message_behind_a_long_task_is_run_once_too(workers, broker_url):
    """Prefetched, it would be restored to the queue and be run by both workers."""
    trail = workers(count=1)
    broker = Broker(broker_url)
    for _ in range(2):
        broker.wake("default")
    assert wait_for_runs(trail, 1, 60) == 1
    time.sleep(TASK_S / 2)
    assert broker.waiting("default") == 1  # left where another worker can take it
    assert wait_for_runs(trail, 2, 60) == 2
    time.sleep(VISIBILITY_S * 2)
    assert len(runs(trail)) == 2
    broker.close()


@pytest.fixture
def own_broker(servers_dir):
    server = EmbeddedBroker(servers_dir / "own", persistent=False).start()
    yield server
    if server.process is not None:
        server.process.send_signal(signal.SIGCONT)
    server.stop()


@pytest.mark.parametrize("known", [True, False], ids=["connected", "fresh"])
@pytest.mark.parametrize("act", ["wake", "ping"])
@pytest.mark.parametrize("state", ["dead", "frozen"])
def test_a_broker_that_is_away_blocks_nobody_for_long(own_broker, state, act, known):
    broker = Broker(own_broker.url)
    if known:
        broker.wake("default")
    if state == "dead":
        own_broker.stop()
    else:
        own_broker.process.send_signal(signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(ServiceUnavailable):
        broker.wake("default") if act == "wake" else broker.ping()
    # Three times as long as it may take: a bound, not a measurement. By default it never returns.
    assert time.monotonic() - started < 3 * SOCKET_TIMEOUT_S
    broker.close()


def test_a_broker_that_comes_back_is_rung_again(own_broker):
    broker = Broker(own_broker.url)
    broker.wake("default")
    own_broker.stop()
    with pytest.raises(ServiceUnavailable):
        broker.wake("default")
    own_broker.start()
    broker.wake("default")
    assert broker.waiting("default") == 1
    broker.close()


def test_the_message_names_a_class_and_nothing_else(broker_server, broker_url):
    from redis import Redis

    broker = Broker(broker_url)
    broker.wake("gpu.8")
    with Redis(unix_socket_path=str(broker_server.socket)) as client:
        assert client.keys() == [b"tunery:gpu.8"]
        envelope = json.loads(client.lindex("tunery:gpu.8", 0))
    assert envelope["headers"]["task"] == WAKE
    assert envelope["content-type"] == "application/json"
    from base64 import b64decode

    arguments, keywords, _ = json.loads(b64decode(envelope["body"]))
    assert (arguments, keywords) == ([{"v": 1, "class": "gpu.8"}], {})
    assert broker.waiting("gpu.8") == 1
    assert broker.waiting("never heard of") == 0
    broker.close()


def test_the_settings_that_keep_long_tasks_single():
    conf = celery_app("redis://nowhere", ["gpu.1", "cpu"]).conf
    assert [queue.name for queue in conf.task_queues] == ["gpu.1", "cpu"]
    assert conf.task_default_queue == "gpu.1"
    assert not conf.task_acks_late
    assert not conf.task_reject_on_worker_lost
    assert conf.worker_disable_prefetch
    assert conf.worker_prefetch_multiplier == 1
    assert conf.task_ignore_result
    assert conf.accept_content == ["json"]
    assert not conf.worker_enable_remote_control
    assert conf.broker_transport_options["socket_timeout"] == SOCKET_TIMEOUT_S
