"""Slots as values, made when they are looked at."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from kvoffload.envelope import Envelope, Fault
from kvoffload.errors import InternalError, MisuseError
from kvoffload.l2.values import Names, SlotBuffers, Values, names_of, seal
from kvoffload.segment import Segment

KEYS = [bytes([index]) * 24 for index in range(4)]


@pytest.fixture
def segments() -> Iterator[list[Segment]]:
    made = [Segment.create(4 * 4096, 4096) for _ in range(2)]
    for segment in made:
        segment.populate_next()
        segment.array[:] = 1
    yield made
    for segment in made:
        segment.close()


def test_a_value_is_header_and_payload_and_not_what_fills_the_slot(segments: list[Segment]) -> None:
    slots = SlotBuffers(segments, 1000)
    assert (slots.ranks, slots.value_bytes, slots.block_bytes) == (2, 1064, 2128)
    slots.array(1, 2)[:] = 7
    assert (segments[1].slot(2)[:1064] == 7).all()
    assert (segments[1].slot(2)[1064:] == 1).all()
    assert (segments[0].array == 1).all()


def test_clearing_takes_the_headers_of_all_ranks_and_nothing_else(segments: list[Segment]) -> None:
    SlotBuffers(segments, 1000).clear([1, 3])
    for segment in segments:
        for slot in range(4):
            assert (segment.slot(slot)[:64] == (0 if slot in (1, 3) else 1)).all()
            assert (segment.slot(slot)[64:] == 1).all()


def test_a_segment_that_is_gone_or_too_small_is_no_buffer(segments: list[Segment]) -> None:
    with pytest.raises(InternalError, match="slot 0 of rank 0"):
        SlotBuffers(segments, 4096).array(0, 0)
    with pytest.raises(MisuseError, match="slot 9"):
        SlotBuffers(segments, 1000).array(0, 9)
    closed = Segment.create(4096, 4096)
    closed.close()
    with pytest.raises(InternalError, match="closed"):
        SlotBuffers([closed], 1000).array(0, 0)


def test_a_check_looks_at_every_rank_and_at_both_ends(segments: list[Segment]) -> None:
    SlotBuffers(segments, 1000).check([3, 0, 2])
    SlotBuffers(segments, 1000).check([])
    for slots in ([1, 4, 2], [-1, 2]):
        with pytest.raises(MisuseError, match=r"slot (4|-1)"):
            SlotBuffers(segments, 1000).check(slots)
    with pytest.raises(InternalError, match="rank 1"):
        SlotBuffers([segments[0], Segment.create(4096, 1024)], 1000).check([0])


def test_values_and_names_go_block_by_block(segments: list[Segment]) -> None:
    slots = SlotBuffers(segments, 1000)
    parts = slots.parts([3, 1], KEYS[:2])
    assert [(part.key, part.rank) for part in parts] == [(KEYS[0], 0), (KEYS[0], 1), (KEYS[1], 0), (KEYS[1], 1)]
    values = Values(slots, "here", [3, 1], KEYS[:2], is_writable=True)
    assert [item.name for item in values] == names_of("here", KEYS[:2], 2) == list(Names("here", KEYS[:2], 2))
    assert len({item.name for item in values}) == len(values) == 4
    values[1].buffer[:] = bytes([9]) * 1064
    assert (segments[1].slot(3)[:1064] == 9).all(), "no copy"
    assert all(item.buffer.readonly for item in Values(slots, "here", [3, 1], KEYS[:2], is_writable=False))
    assert values[0] is values[0], "made once"
    with pytest.raises(InternalError, match="2 slots and 1 keys"):
        Values(slots, "here", [1, 2], KEYS[:1], is_writable=True)
    with pytest.raises(MisuseError, match="slot 9"):
        Values(slots, "here", [1, 9], KEYS[:2], is_writable=True)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("is_made", [False, True])
def test_a_run_is_what_a_list_would_give(segments: list[Segment], ranks: int, is_made: bool) -> None:
    slots = SlotBuffers(segments[:ranks], 1000)
    expected = list(zip(names_of("here", KEYS, ranks), [part.slot.ctypes.data for part in slots.parts([2, 0, 3, 1], KEYS)], strict=True))
    for start in range(9):
        for stop in (*range(9), -1, None):
            values, names = Values(slots, "here", [2, 0, 3, 1], KEYS, is_writable=True), Names("here", KEYS, ranks)
            if is_made:
                list(values), list(names)
            run = values[1:][start:stop]
            assert len(run) == len(expected[1:][start:stop])
            assert [(name, np.frombuffer(buffer, np.uint8).ctypes.data) for name, buffer in run] == expected[1:][start:stop]
            assert list(names[1:][start:stop]) == [name for name, _ in expected[1:][start:stop]]
    for step in (2, 3, -1, -2):
        for at in (slice(None, None, step), slice(1, None, step), slice(None, -1, step), slice(6, 1, step), slice(0, 0, step)):
            values, names = Values(slots, "here", [2, 0, 3, 1], KEYS, is_writable=True), Names("here", KEYS, ranks)
            if is_made:
                list(values), list(names)
            some, wanted = values[at][::2], expected[at][::2]
            assert len(some) == len(wanted)
            assert [(name, np.frombuffer(buffer, np.uint8).ctypes.data) for name, buffer in some] == wanted
            assert list(names[at][::2]) == [name for name, _ in wanted]
    values = Values(slots, "here", [2, 0, 3, 1], KEYS, is_writable=True)
    assert [values[index].name for index in (-1, 0)] == [expected[-1][0], expected[0][0]]
    assert [item.name for item in values[::2]] == [name for name, _ in expected[::2]]
    with pytest.raises(IndexError):
        values[len(expected)]


class _Watched:
    """A segment that knows who looks at its slots."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self.seen: list[int] = []

    def slot(self, index: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        self.seen.append(threading.get_ident())
        return self.segment.slot(index)


def test_values_are_made_by_who_looks_at_them(segments: list[Segment]) -> None:
    watched = _Watched(segments[0])
    values = Values(SlotBuffers([watched], 1000), "here", [0, 1, 2, 3], KEYS, is_writable=True)
    assert len(watched.seen) <= 2, "only the first and the last are looked at where they were asked for"
    run = values[::2]
    assert len(run) == 2
    assert len(watched.seen) <= 2
    del watched.seen[:]
    thread = threading.Thread(target=lambda: list(run))
    thread.start()
    thread.join()
    assert len(watched.seen) == 2
    assert threading.get_ident() not in watched.seen


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_was_sealed_is_proven_by_slot_key_and_rank(segments: list[Segment], ranks: int) -> None:
    envelope, buffers = Envelope(bytes(24), 1000), SlotBuffers(segments[:ranks], 1000)
    seal(envelope, buffers, [2, 0], KEYS[:2])

    def proven(slots: list[int]) -> Values:
        values = Values(buffers, "n", slots, KEYS[:2], is_writable=True, envelope=envelope)
        values.prove(range(len(values)), lambda: False)
        assert values.proven == b"\1" * 2 * ranks
        return values

    assert proven([2, 0]).faults == {}
    assert proven([0, 2]).faults == dict.fromkeys(range(2 * ranks), Fault.KEY)
    segments[0].slot(0)[500] ^= 1
    assert proven([2, 0]).faults == {ranks: Fault.TAG}


def test_what_is_proven_of_a_slice_is_known_of_the_whole(segments: list[Segment]) -> None:
    envelope, buffers = Envelope(bytes(24), 1000), SlotBuffers(segments[:2], 1000)
    seal(envelope, buffers, [2, 0, 1], KEYS[:3])
    segments[1].slot(0)[500] ^= 1
    values = Values(buffers, "n", [2, 0, 1], KEYS[:3], is_writable=True, envelope=envelope)
    some = values[1::2]
    assert isinstance(some, Values)
    some.prove([1, 2], lambda: False)
    assert values.proven == bytes([0, 0, 0, 1, 0, 1])
    assert values.faults == {3: Fault.TAG}


def test_who_is_stopped_proves_no_more(segments: list[Segment]) -> None:
    envelope, buffers = Envelope(bytes(24), 1000), SlotBuffers(segments[:1], 1000)
    seal(envelope, buffers, [0, 1, 2], KEYS[:3])
    values = Values(buffers, "n", [0, 1, 2], KEYS[:3], is_writable=True, envelope=envelope)
    stops = iter([False, False, True])
    values.prove(range(3), lambda: next(stops))
    assert values.proven == bytes([1, 1, 0])


def test_without_an_envelope_nothing_is_proven(segments: list[Segment]) -> None:
    values = Values(SlotBuffers(segments[:1], 1000), "n", [0], KEYS[:1], is_writable=True)
    values.prove([0], lambda: False)
    assert values.proven == b"\0"


def test_views_are_of_the_segment_itself(segments: list[Segment]) -> None:
    assert np.shares_memory(SlotBuffers(segments, 1000).array(0, 0), segments[0].array)
