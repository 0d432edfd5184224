"""The farm's scheduler, with made-up devices."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import Empty, Queue

import pytest

from tvm_pivot.errors import TuningError
from tvm_pivot.tuning.dispatch import DeviceLostError, Dispatcher, NoDeviceError

LONG = 60.0


@dataclass
class Pool:
    """Devices by name; `behave` measures a job on one of them."""

    names: list[str]
    behave: Callable[[str, int], list[float]]
    free: Queue[str] = field(default_factory=Queue)
    used: list[tuple[str, int]] = field(default_factory=list)
    given_back: Counter[str] = field(default_factory=Counter)
    closed: bool = False

    def __post_init__(self) -> None:
        for name in self.names:
            self.free.put(name)

    def count(self) -> int:
        return len(self.names)

    def acquire(self, slot: int) -> Fake:
        try:
            return Fake(self, self.free.get(timeout=0.05))
        except Empty:
            raise NoDeviceError("all are busy") from None

    def close(self) -> None:
        self.closed = True


@dataclass(frozen=True)
class Fake:
    """One of them."""

    pool: Pool
    name: str

    def measure(self, job: int) -> list[float]:
        self.pool.used.append((self.name, job))
        try:
            return self.pool.behave(self.name, job)
        finally:
            self.pool.free.put(self.name)

    def give_back(self) -> None:
        self.pool.given_back[self.name] += 1
        self.pool.free.put(self.name)


def outcome(future: Future[list[float]]) -> list[float] | str:
    """The times, or why there are none."""
    try:
        return future.result(LONG)
    except TuningError as e:
        return str(e)


def test_as_many_trials_at_a_time_as_devices() -> None:
    together = threading.Barrier(4)

    def behave(name: str, job: int) -> list[float]:
        together.wait(LONG)  # ends only with three others
        return [float(job)]

    pool = Pool(["a", "b", "c", "d"], behave)
    results = Dispatcher(pool).submit(range(16))
    assert [outcome(result) for result in results] == [[float(i)] for i in range(16)]
    assert Counter(name for name, _ in pool.used) == dict.fromkeys("abcd", 4)


def test_new_devices_join_with_the_next_batch() -> None:
    pool = Pool(["a"], lambda name, job: [1.0])
    dispatcher = Dispatcher(pool)
    assert outcome(dispatcher.submit([0])[0]) == [1.0]
    together = threading.Barrier(2)
    pool.behave = lambda name, job: [float(together.wait(LONG) >= 0)]
    pool.names.append("b")
    pool.free.put("b")
    assert [outcome(result) for result in dispatcher.submit([1, 2])] == [[1.0], [1.0]]


def test_a_lost_device_loses_only_its_trial_which_is_repeated_elsewhere() -> None:
    def behave(name: str, job: int) -> list[float]:
        if name == "bad":
            raise DeviceLostError("it smokes")
        return [float(job)]

    pool = Pool(["bad", "good", "better"], behave)
    results = Dispatcher(pool, patience_s=LONG).submit(range(30))
    assert [outcome(result) for result in results] == [[float(i)] for i in range(30)]
    assert max(Counter(pool.used).values()) == 1  # nothing twice on one device


def test_a_candidate_that_crashes_everywhere_fails_and_ends() -> None:
    def behave(name: str, job: int) -> list[float]:
        if job == 3:
            raise DeviceLostError(f"{name} crashed")
        return [float(job)]

    pool = Pool(list("abcde"), behave)
    results = [outcome(r) for r in Dispatcher(pool, patience_s=LONG).submit(range(8))]
    assert [r for r in results if isinstance(r, list)] == [[float(i)] for i in range(8) if i != 3]
    assert "lost" in results[3] and "crashed" in results[3]
    tried = [name for name, job in pool.used if job == 3]
    assert len(tried) == len(set(tried)) == 3


def test_the_only_device_gets_a_second_chance() -> None:
    crashes = iter([True, False])

    def behave(name: str, job: int) -> list[float]:
        if next(crashes):
            raise DeviceLostError("once")
        return [7.0]

    assert outcome(Dispatcher(Pool(["only"], behave)).submit([0])[0]) == [7.0]


def test_a_device_is_given_back_where_another_has_to_do_it() -> None:
    """One has failed the only trial and the other is busy elsewhere, until we say so."""
    pool = Pool(["a", "b"], lambda name, job: [1.0])
    assert pool.free.get() == "a" and pool.free.get() == "b"

    def behave(name: str, job: int) -> list[float]:
        if name == "a":
            raise DeviceLostError("a again")
        return [2.0]

    pool.behave = behave
    pool.free.put("a")
    (result,) = Dispatcher(pool, patience_s=LONG).submit([0])
    while not pool.given_back["a"]:
        assert not result.done()
    pool.free.put("b")
    assert outcome(result) == [2.0]


def test_without_patience_the_same_device_serves_again() -> None:
    def behave(name: str, job: int) -> list[float]:
        raise DeviceLostError("no")

    pool = Pool(["a", "never free"], behave)
    assert [pool.free.get(), pool.free.get()] == ["a", "never free"]
    pool.free.put("a")
    (result,) = Dispatcher(pool, patience_s=0, attempts=2).submit([0])
    assert "lost a and a" in str(outcome(result))


@pytest.mark.parametrize("error", [TuningError("it is wrong"), ValueError("a bug")])
def test_a_candidate_to_blame_is_not_repeated(error: Exception) -> None:
    def behave(name: str, job: int) -> list[float]:
        raise error

    pool = Pool(["a", "b"], behave)
    (result,) = Dispatcher(pool).submit([0])
    assert str(error) in str(outcome(result))
    assert len(pool.used) == 1


def test_a_farm_without_devices_is_not_waited_for_for_ever() -> None:
    pool = Pool([], lambda name, job: [1.0])
    dispatcher = Dispatcher(pool, wait_s=0.3)
    for result in dispatcher.submit([0, 1]):
        assert outcome(result) == "no device for 0.3 s: all are busy"
    pool.names.append("late")
    pool.free.put("late")
    assert outcome(dispatcher.submit([2])[0]) == [1.0]


def test_a_bug_where_devices_come_from_does_not_hang() -> None:
    class Broken(Pool):
        def acquire(self, slot: int) -> Fake:
            raise KeyError("a bug")

    (result,) = Dispatcher(Broken(["a"], lambda name, job: []), wait_s=0.2).submit([0])
    assert "KeyError" in str(outcome(result))


def test_closing_ends_what_waits() -> None:
    started, go_on = threading.Event(), threading.Event()

    def behave(name: str, job: int) -> list[float]:
        started.set()
        assert go_on.wait(LONG)
        raise DeviceLostError("closed")

    pool = Pool(["a"], behave)
    dispatcher = Dispatcher(pool)
    results = dispatcher.submit(range(3))
    assert started.wait(LONG)
    dispatcher.close()
    go_on.set()
    assert {outcome(result) for result in results} == {"measuring was stopped"}
    assert pool.closed
    with pytest.raises(TuningError, match="closed"):
        dispatcher.submit([0])


def test_nothing_to_do() -> None:
    assert Dispatcher(Pool(["a"], lambda name, job: [])).submit([]) == []
