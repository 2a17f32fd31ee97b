"""Each policy against a model in plain lists, under random histories; and the evictor's rule on top of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvoffload.l1.eviction import LRU, S3FIFO, EvictionPolicy, make_policy
from kvoffload.l1.eviction import s3fifo as s3fifo_rules
from kvoffload.l1.eviction.ghosts import Ghosts
from kvoffload.l1.eviction.s3fifo import HOTTEST

SLOTS = 12
KEYS = [bytes([number]) * 24 for number in range(40)]


def assume_apart(ghosts: Ghosts) -> list[bytes]:
    """Keys that do not displace each other in the ghosts' table: which do depends on the process's hash seed."""
    places: dict[int, bytes] = {}
    for key in KEYS:
        places.setdefault(hash(key) & ghosts.mask, key)
    return list(places.values())


class Model(Protocol):
    def admit(self, slot: int, key: bytes) -> None: ...
    def touch(self, slot: int) -> None: ...
    def begin(self) -> None: ...
    def name(self) -> int: ...
    def send_back(self, slot: int) -> None: ...
    def keep(self, slot: int) -> None: ...
    def evict(self, slot: int, key: bytes) -> None: ...
    def discard(self, slot: int) -> None: ...
    def order(self) -> list[int]: ...


class LRUModel:
    def __init__(self) -> None:
        self.queue: list[int] = []

    def admit(self, slot: int, key: bytes) -> None:
        self.queue.append(slot)

    def touch(self, slot: int) -> None:
        self.queue.remove(slot)
        self.queue.append(slot)

    send_back = keep = touch

    def begin(self) -> None:
        pass

    def name(self) -> int:
        return self.queue[0] if self.queue else -1

    def evict(self, slot: int, key: bytes) -> None:
        self.queue.remove(slot)

    def discard(self, slot: int) -> None:
        self.queue.remove(slot)

    def order(self) -> list[int]:
        return self.queue


class S3FIFOModel:
    """The paper's algorithm 1 with its three lists, and the bound on chances."""

    def __init__(self, capacity: int, ratio: float) -> None:
        self.share = max(1, int(ratio * capacity))
        self.bound = capacity - self.share
        self.small: list[int] = []
        self.main: list[int] = []
        self.uses: dict[int, int] = {}
        self.ghosts: list[bytes | None] = []
        self.chances = 0

    def begin(self) -> None:
        self.chances = s3fifo_rules.CHANCES

    def admit(self, slot: int, key: bytes) -> None:
        self.uses[slot] = 0
        if key in self.ghosts:
            self.ghosts[self.ghosts.index(key)] = None
            self.main.append(slot)
        else:
            self.small.append(slot)

    def touch(self, slot: int) -> None:
        self.uses[slot] = min(HOTTEST, self.uses[slot] + 1)

    def name(self) -> int:
        while self.small or self.main:
            if self.small and (len(self.small) >= self.share or not self.main):
                slot = self.small[0]
                if not self.chances or not self.uses[slot]:
                    return slot
                self.main.append(self.small.pop(0))
                self.uses[slot] = 0
            else:
                slot = self.main[0]
                if not self.chances or not self.uses[slot]:
                    return slot
                self.main.append(self.main.pop(0))
                self.uses[slot] -= 1
            self.chances -= 1
        return -1

    def send_back(self, slot: int) -> None:
        queue = self.small if slot in self.small else self.main
        queue.remove(slot)
        queue.append(slot)

    def keep(self, slot: int) -> None:
        if slot in self.small:
            self.uses[slot] = 0
        self.discard(slot)
        self.main.append(slot)

    def evict(self, slot: int, key: bytes) -> None:
        if slot in self.small:
            self.ghosts = [*self.ghosts, key][-self.bound :]
        self.discard(slot)

    def discard(self, slot: int) -> None:
        (self.small if slot in self.small else self.main).remove(slot)

    def order(self) -> list[int]:
        return self.small + self.main


def lru() -> tuple[EvictionPolicy, Model, list[Any], list[bytes]]:
    return LRU(SLOTS), LRUModel(), [None] * SLOTS, KEYS


def s3fifo() -> tuple[EvictionPolicy, Model, list[Any], list[bytes]]:
    key_of: list[Any] = [None] * SLOTS
    policy = S3FIFO(SLOTS, key_of, small_ratio=0.3)
    policy.resize(SLOTS)
    return policy, S3FIFOModel(SLOTS, 0.3), key_of, assume_apart(policy.ghosts)


def s3fifo_all_at_once() -> tuple[EvictionPolicy, Model, list[Any], list[bytes]]:
    made = s3fifo()
    assert isinstance(made[0], S3FIFO)
    made[0].many = 1
    return made


steps = st.lists(
    st.tuples(
        st.sampled_from(["begin", "admit", "admit", "touch", "name", "send_back", "keep", "evict", "evict", "take_out", "discard"]),
        st.integers(0, 1000),
        st.integers(1, 5),
    ),
    max_size=80,
)


@pytest.fixture(params=[3, 1_000], ids=["few chances", "many chances"])
def chances(request: pytest.FixtureRequest) -> Iterator[int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(s3fifo_rules, "CHANCES", request.param)
        yield request.param


@pytest.mark.usefixtures("chances")
@pytest.mark.parametrize("make", [lru, s3fifo, s3fifo_all_at_once])
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(history=steps)
def test_a_policy_is_its_model(
    make: Callable[[], tuple[EvictionPolicy, Model, list[Any], list[bytes]]], history: Sequence[tuple[str, int, int]]
) -> None:
    policy, model, key_of, keys = make()
    policy.begin()
    model.begin()
    for verb, number, count in history:
        inside = model.order()
        if verb == "begin":
            policy.begin()
            model.begin()
        elif verb == "admit":
            free = [slot for slot in range(SLOTS) if slot not in inside][:count]
            fresh = [key for key in (keys[number % len(keys) :] + keys) if key not in [key_of[slot] for slot in inside]]
            for slot, key in zip(free, fresh, strict=False):
                key_of[slot] = key
                model.admit(slot, key)
            policy.admit(free)
        elif verb == "touch":
            touched = [slot for slot in inside if slot % count == number % count]
            policy.touch(touched)
            for slot in touched:
                model.touch(slot)
        elif verb in ("take_out", "discard") and inside:
            slot = inside[number % len(inside)]
            if verb == "discard":
                policy.discard(slot)
                model.discard(slot)
            else:
                policy.take_out(slot, key_of[slot])
                model.evict(slot, key_of[slot])
        elif verb in ("name", "send_back", "keep", "evict"):
            named = policy.names(count)
            assert bool(named) == bool(inside)
            assert len(named) <= count
            assert named[:1] == [slot for slot in [model.name()] if slot >= 0]
            if verb in ("send_back", "keep") and named:
                getattr(policy, verb)(named[0])
                getattr(model, verb)(named[0])
            elif verb == "evict" and named:
                gone = named[: 1 + number % len(named)]
                policy.evict(gone, [key_of[slot] for slot in gone])
                for slot in gone:
                    assert model.name() == slot, "each is the next to go once those before it have gone"
                    model.evict(slot, key_of[slot])
        policy.check()
        assert policy.order() == model.order()
        assert len(policy) == len(model.order())
    policy.clear()
    policy.check()
    assert policy.order() == []


def test_ghosts_are_the_last_evictions_and_never_more() -> None:
    """AIBrix's are bounded in bytes, of which they have none: it remembers every key it ever saw."""
    ghosts = Ghosts(64)
    ghosts.bound = 8
    keys = [number.to_bytes(24, "big") for number in range(20_000)]
    ghosts.add(keys)
    assert len(ghosts) <= 8
    assert not any(ghosts.pop(hash(key)) for key in keys[:-8])
    remembered = len(ghosts)
    assert remembered >= 4, "displaced by one another, by a chance of one in billions"
    assert sum(ghosts.pop(hash(key)) for key in keys[-8:]) == remembered
    assert len(ghosts) == 0
    ghosts.check()


def test_a_ghost_goes_to_main_and_is_a_ghost_no_more() -> None:
    policy, _, key_of, keys = s3fifo()
    key_of[0] = keys[0]
    policy.admit([0])
    policy.evict(policy.names(1), [keys[0]])
    policy.admit([0])
    for slot in (1, 2, 3):
        key_of[slot] = keys[slot]
        policy.admit([slot])
    assert policy.names(9) == [1], "small has its share until one has gone"
    assert policy.order() == [1, 2, 3, 0]


def test_slots_that_are_all_hot_are_named_all_the_same_after_so_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3fifo_rules, "CHANCES", 6)
    slots = 1000
    policy = S3FIFO(slots, [number.to_bytes(24, "big") for number in range(slots)])
    policy.resize(slots)
    policy.admit(range(slots))
    for _ in range(HOTTEST):
        policy.touch(range(slots))
    policy.begin()
    assert policy.names(3) == [6, 7, 8]
    assert policy.order()[-6:] == list(range(6)), "so many went on to main, and no more"
    policy.evict([6], [b""])
    assert policy.names(1) == [7]
    policy.begin()
    assert policy.names(1) == [13]


@pytest.mark.parametrize("name", ["lru", "s3fifo"])
def test_a_scan_does_not_push_out_what_is_used(name: Any) -> None:
    slots = 100
    key_of: list[Any] = [None] * slots
    policy = make_policy(name, slots, key_of)
    policy.resize(slots)
    policy.admit([])
    kept = list(range(5))
    for slot in range(slots):
        key_of[slot] = b"first%d" % slot
    policy.admit(range(slots))
    for number in range(5 * slots):
        policy.touch(kept)
        (slot,) = policy.names(1)
        assert slot not in kept
        policy.evict([slot], [key_of[slot]])
        key_of[slot] = b"scan%d" % number
        policy.admit([slot])
