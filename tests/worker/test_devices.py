from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tunery.errors import InvalidConfig
from worker import devices, supervisor
from worker.devices import CPU_RANKS, Device, Slots, memory_used, offered, still_held
from worker.environment import trainer_environment, warm_environment

if TYPE_CHECKING:
    from pathlib import Path

GPUS = [Device("cuda", str(n), "H100", 80 << 30) for n in range(4)]


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_gpus", lambda: GPUS)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_gpus", list)


@pytest.mark.usefixtures("four_gpus")
def test_auto_offers_what_the_worker_itself_may_see() -> None:
    assert offered("auto", {}) == GPUS
    assert offered("auto", {"CUDA_VISIBLE_DEVICES": "2,3"}) == GPUS[2:]


@pytest.mark.usefixtures("four_gpus")
def test_indices_are_taken_in_the_order_given_and_must_exist() -> None:
    assert [device.id for device in offered("3,1", {})] == ["3", "1"]
    with pytest.raises(InvalidConfig, match="no GPU 7"):
        offered("0,7", {})


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_auto_is_one_cpu_slot() -> None:
    assert [device.kind for device in offered("auto", {})] == ["cpu"]
    assert len(offered("cpu:3", {})) == 3


def test_a_slot_is_taken_once_and_freed_by_the_last_descriptor(tmp_path: Path) -> None:
    ours, theirs = (Slots(tmp_path, name, GPUS[:2]) for name in ("a", "b"))
    held = ours.free()
    assert [slot.device.id for slot in held] == ["0", "1"]
    assert theirs.free() == []
    kept = os.dup(held[0].fd)  # as a lifeline holds it
    for slot in held:
        slot.release()
    free = theirs.free()
    assert [slot.device.id for slot in free] == ["1"]
    os.close(kept)
    assert [slot.device.id for slot in theirs.free()] == ["0"]


def test_two_workers_do_not_share_cpu_slots(tmp_path: Path) -> None:
    cpu = [Device("cpu", "0", "CPU")]
    first, second = Slots(tmp_path, "a", cpu), Slots(tmp_path, "b", cpu)
    assert len(first.free()) == len(second.free()) == 1


def test_a_dead_holder_frees_its_slots(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from worker.devices import *\n"
        "held = Slots(Path(sys.argv[1]), 'a', [Device('cuda', '0', 'x')]).free()\n"
        "print(len(held), flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    with holder.stdout:
        assert holder.stdout.readline() == b"1\n"
    slots = Slots(tmp_path, "b", GPUS[:1])
    assert slots.free() == []
    holder.kill()
    holder.wait()
    assert len(slots.free()) == 1


def test_one_job_may_have_a_whole_cpu_machine_but_not_a_used_one(tmp_path: Path) -> None:
    slots = Slots(tmp_path, "a", [Device("cpu", str(n), "CPU") for n in range(2)])
    held = slots.free()
    assert slots.capacity(held) == CPU_RANKS
    assert slots.capacity(held[:1]) == 1
    assert Slots(tmp_path, "a", GPUS).capacity(Slots(tmp_path, "a", GPUS).free()) == 4


def test_only_one_looks_for_devices_at_a_time(tmp_path: Path) -> None:
    slots = Slots(tmp_path, "a", GPUS)
    with slots.taking() as ours, slots.taking() as theirs:
        assert (ours, theirs) == (True, False)
    with slots.taking() as again:
        assert again


def test_memory_that_a_dead_trainer_still_holds_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [["0", "900"], ["1", "70000"], ["2", "[N/A]"]]
    monkeypatch.setattr(devices, "_ask", lambda columns: rows)
    now = memory_used(GPUS)
    assert now == {"0": 900 << 20, "1": 70000 << 20}
    assert still_held({"0": 800 << 20, "1": 800 << 20}, now) == ["1"]
    assert still_held({"0": 800 << 20, "1": 69900 << 20}, now) == []  # another's, from before
    assert memory_used([Device("cpu", "0", "CPU")]) == {}


async def test_a_gpu_whose_memory_does_not_come_back_stays_locked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    used = iter([{"0": 0}, {"0": 70 << 30}, {"0": 0}, {"0": 0}])
    monkeypatch.setattr(supervisor, "memory_used", lambda devices: next(used))
    monkeypatch.setattr(supervisor, "GIVE_BACK_S", -1.0)
    slots = Slots(tmp_path, "a", GPUS[:1])
    held = slots.free()

    class Done:
        survivors = 0

        def __init__(self, *_: object) -> None: ...

        async def run(self) -> None: ...

    monkeypatch.setattr(supervisor, "Attempt", Done)
    ours = supervisor.Supervisor(None, None, slots, [])  # type: ignore[arg-type]
    await ours._carry_out(None, None, held, 0.0)  # type: ignore[arg-type]
    assert slots.free() == []
    held[0].release()
    held = slots.free()
    await ours._carry_out(None, None, held, 0.0)  # type: ignore[arg-type]
    assert len(slots.free()) == 1


def test_the_trainers_environment_is_an_allow_list() -> None:
    own = {
        "PATH": "/bin",
        "NCCL_DEBUG": "INFO",
        "TUNERY_DATABASE_URL": "postgresql://u:p@h/d",
        "AWS_SECRET_ACCESS_KEY": "x",
        "HF_TOKEN": "hf_x",
        "SOMETHING_NEW": "1",
        "CUDA_VISIBLE_DEVICES": "0,1,2,3",
    }
    made = trainer_environment(own, devices=["2", "3"], threads=4)
    assert made["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert made["OMP_NUM_THREADS"] == "4"
    assert made["PATH"] == "/bin"
    assert made["NCCL_DEBUG"] == "INFO"
    assert not set(made) & {"TUNERY_DATABASE_URL", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN"}
    assert "SOMETHING_NEW" not in made
    # The warm pool's libgomp reads it before the fork.
    assert made["GOMP_SPINCOUNT"] == warm_environment(own)["GOMP_SPINCOUNT"] == "1000"
    assert trainer_environment({"GOMP_SPINCOUNT": "7"}, devices=[], threads=1)[
        "GOMP_SPINCOUNT"
    ] == ("7")
    assert warm_environment(own)["CUDA_VISIBLE_DEVICES"] == ""
