"""Two processes share a corpus out: the same result as one; where one of them dies the other says so, and both go on later."""

import time

import pytest
import torch
from whole_profiles import assert_same, same_vectors

from fastheads import HeadProfile
from fastheads.errors import OptionError
from fastheads.run import job as distributed
from fastheads.run.job import Job, RankInfo, rank_info_from_environment

RESUME = "Ended; its last checkpoint is kept; run the same command with --resume to continue from it"

processes = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch has no distributed package"
)


def assert_close(found: HeadProfile, want: HeadProfile, rtol: float) -> None:
    for metric in want.metrics:
        for plane, value in want.moments[metric]._asdict().items():
            other = getattr(found.moments[metric], plane)
            if plane in ("count", "nonfinite", "min", "max") and rtol <= 1e-12:
                assert torch.equal(other, value), (metric, plane)
            else:
                torch.testing.assert_close(other, value, rtol=rtol, atol=0)
    assert want.vectors is not None and same_vectors(found, want, rtol)


@processes
@pytest.mark.slow
def test_two_processes_find_what_one_finds(happened):
    found, folder = happened("two")
    assert (found["codes"], found["said"]) == ([0, 0], ["", ""])
    first, second, file = (
        HeadProfile.load(folder / f"{name}.safetensors") for name in ("two.0", "two.1", "two")
    )
    assert_same(second, first)
    assert_same(file, first)
    one = HeadProfile.load(folder / "one.safetensors")
    assert_close(file, one, 1e-12)
    data = file.metadata["data"]
    for key in ("source", "sha256", "tokens", "sequences", "shard", "complete"):
        assert data[key] == one.metadata["data"][key]
    assert data["processes"] == 2
    assert data["padding"] == pytest.approx(one.metadata["data"]["padding"], abs=1e-4)
    assert not list(folder.glob("*two.checkpoint*"))


@processes
@pytest.mark.slow
def test_where_one_is_killed_the_other_ends_and_says_so_and_both_go_on(happened):
    happened("two")
    found, folder = happened("lost")
    assert found["codes"] == [1, -9]
    assert f"rank 0: no heartbeat of rank 1 for 2 s. {RESUME}" in found["said"][0]
    assert found["left"] == ["lost.checkpoint-1-of-2", "lost.checkpoint-2-of-2"]
    assert (found["again"], found["at_last"], found["rests"]) == ([0, 0], ["", ""], [])
    assert_same(
        *(HeadProfile.load(folder / f"{name}.safetensors") for name in ("lost", "two")),
    )


@processes
@pytest.mark.slow
def test_an_error_of_one_is_told_by_the_other(happened):
    found, _ = happened("failed")
    assert found["codes"] == [1, 1]
    assert f"rank 0: rank 1 failed: 'NoneType' object is not callable. {RESUME}" in found["said"][0]


@pytest.fixture
def stores(monkeypatch):
    """The store that processes share, as torchrun has it. Alone in this list: taken out, it ends."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    return [store]


@pytest.fixture
def heartbeat_of(stores):
    """Starts the heartbeat of one of two processes in this one, with its thread."""
    started = []

    def start(rank):
        started.append(distributed.Heartbeat(RankInfo(rank, 2)))
        started[-1].start()
        return started[-1]

    yield start
    for heartbeat in started:
        heartbeat.loss_noticed.set()  # else it would end this process
        heartbeat.stop()


def eventually(condition, seconds=10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@processes
def test_what_was_said_of_one_profile_is_no_news_of_the_next(heartbeat_of):
    first, second = heartbeat_of(0), heartbeat_of(1)
    for heartbeat in (first, second):
        heartbeat.begin()
        heartbeat.tokens = 100
        heartbeat.arrive(3)
        heartbeat.publish("saved", "")
    assert first.all_reached("saved")
    assert first.all_arrived(3)
    assert first.total == 200
    first.begin()
    assert (first.tokens, first.total) == (0, 0)
    first.tokens = 5
    first.arrive(1)
    assert not first.all_reached("measured")
    assert not first.all_arrived(1)
    assert first.total == 5
    assert second.all_reached("saved")  # with the run before, as one that has begun another is
    assert second.all_arrived(4)
    second.begin()
    assert not first.all_arrived(1)
    second.arrive(1)
    assert first.all_arrived(1)
    assert not first.all_reached("measured")
    second.publish("ended", "")
    assert first.all_reached("saved")


@processes
def test_the_end_of_the_store_ends_the_wait_of_any_run(heartbeat_of, stores, monkeypatch):
    """The process that has it ends as soon as all have saved."""
    monkeypatch.setattr(distributed, "HEARTBEAT", 0.05)
    first, second = heartbeat_of(0), heartbeat_of(1)
    first.begin()
    first.publish("saved", "")
    assert not first.all_reached("saved")
    stores.clear()
    assert eventually(lambda: first.all_reached("saved"))
    assert first.lost is None
    # The other was at work still: to it that is a loss.
    assert eventually(lambda: second.lost is not None)
    assert "rank 1: the store that the ranks share cannot be reached" in second.lost


@processes
def test_what_an_attempt_before_has_left_in_the_store_is_no_news(heartbeat_of, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    heartbeat_of(1).publish("failed", "it broke")
    again = heartbeat_of(0)
    assert eventually(lambda: again.lost is not None)
    assert again.lost == f"rank 0: rank 1 failed: it broke. {RESUME}"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    afresh = heartbeat_of(0)
    assert not afresh.all_reached("measured")  # it has looked
    assert afresh.lost is None


def test_a_loss_is_noticed_within_a_minute():
    """By the times that the test above shortens."""
    assert distributed.HEARTBEAT_TIMEOUT + distributed.GRACE + 5 * distributed.HEARTBEAT <= 45


@processes
@pytest.mark.slow
def test_processes_that_share_a_model_stop_and_go_on_together(happened):
    found, folder = happened("tensor_parallel")
    assert found["codes"] == [43, 43]
    assert found["said"][0] == found["said"][1]  # as many tokens
    assert (found["again"], found["at_last"]) == ([0, 0], ["", ""])
    first, second = (HeadProfile.load(folder / f"tensor.{rank}.safetensors") for rank in range(2))
    assert_same(second, first)
    # The model itself sums in another order over two processes.
    assert_close(first, HeadProfile.load(folder / "one.safetensors"), 2e-5)


@processes
@pytest.mark.slow
def test_all_processes_find_together_that_the_ranking_has_settled(happened):
    found, folder = happened("stable")
    assert (found["codes"], found["again"]) == ([0, 0], [0, 0])
    one, two, lost = (
        HeadProfile.load(folder / f"{name}.safetensors") for name in ("one-stable", "stable", "stable-lost")
    )
    assert_same(lost, two)
    assert_same(HeadProfile.load(folder / "stable.1.safetensors"), two)
    everything = HeadProfile.load(folder / "one.safetensors").metadata["data"]["sequences"]
    for found in (one, two):
        assert found.metadata["data"]["until_stable"]["settled"]
        assert found.metadata["data"]["sequences"] < everything
    # Two begin two windows at a time.
    assert two.metadata["data"]["sequences"] >= one.metadata["data"]["sequences"]


@pytest.mark.parametrize(
    ("environment", "tp", "place", "shard"),
    [
        ({}, 1, RankInfo(0, 1, 0, 1), (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, 1, RankInfo(3, 4, 1, 1), (3, 4)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, 2, RankInfo(3, 4, 1, 2), (1, 2)),
        ({"RANK": "1", "WORLD_SIZE": "4"}, 4, RankInfo(1, 4, 0, 4), (0, 1)),
    ],
)
def test_the_environment_says_who_a_process_is(monkeypatch, environment, tp, place, shard):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert rank_info_from_environment(tp) == place
    assert place.shard == shard


@pytest.mark.parametrize(
    ("environment", "tp", "says"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, 1, "RANK=x, WORLD_SIZE=2, LOCAL_RANK=None are not whole numbers"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, 1, "contradict each other"),
        ({"RANK": "0", "WORLD_SIZE": "3"}, 2, "tp=2 does not divide the number of processes, 3"),
        ({}, 2, "tp=2 does not divide the number of processes, 1: start them with torchrun"),
        ({}, 0, "tp=0 does not divide"),
    ],
)
def test_an_environment_that_makes_no_sense_is_refused(monkeypatch, environment, tp, says):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OptionError if "tp=" in says else ValueError, match=says):
        Job(tp)
