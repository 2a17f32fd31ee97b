"""Random histories of a mailbox against the obvious model: bounded, in order, nothing lost, nothing doubled, everything counted."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvoffload.mailbox import EndOfMailbox, OnFull, Receiver, Sender, ThreadSender, open_mailbox


class MailboxHistory(RuleBasedStateMachine):
    """Offers and debts from the loop's and a thread's end, bursts, clones, ends; wake-ups arrive when they please."""

    @initialize(capacity=st.integers(1, 5), policy=st.sampled_from(OnFull))
    def open(self, capacity: int, policy: OnFull) -> None:
        self.capacity, self.policy = capacity, policy
        self.wake_ups: deque[Callable[[], None]] = deque()
        self.sender: Sender[int]
        self.receiver: Receiver[int]
        self.sender, self.receiver = open_mailbox("m", capacity, policy, call_soon=self.wake_ups.append)
        self.post = self.sender.threadsafe()
        self.ends: list[Sender[int] | ThreadSender[int]] = [self.sender, self.post]
        self.model: list[tuple[int, bool]] = []  # number, owed
        self.next = self.accepted = self.owed = self.refused = self.dropped = self.handled = 0
        self.is_closed = False

    def _expect_offer(self) -> bool:
        room = sum(not owed for _, owed in self.model) < self.capacity
        if room or (self.policy is OnFull.LATEST):
            if not room:
                newest = max(i for i, (_, owed) in enumerate(self.model) if not owed)
                del self.model[newest]
                self.dropped += 1
            self.model.append((self.next, False))
            self.accepted += 1
            return True
        if self.policy is OnFull.DROP_NEWEST:
            self.dropped += 1
        else:
            self.refused += 1
        return False

    @precondition(lambda self: not self.is_closed and self.ends)
    @rule(which=st.integers(0, 99))
    def offer(self, which: int) -> None:
        self.next += 1
        expected = self._expect_offer()
        assert self.ends[which % len(self.ends)].offer(self.next) == expected

    @precondition(lambda self: not self.is_closed and self.ends)
    @rule(which=st.integers(0, 99))
    def owe(self, which: int) -> None:
        self.next += 1
        self.ends[which % len(self.ends)].owe(self.next)
        self.model.append((self.next, True))
        self.owed += 1

    @rule(limit=st.integers(1, 8))
    def receive(self, limit: int) -> None:
        expected = [number for number, _ in self.model[:limit]]
        try:
            burst = self.receiver.receive_nowait(limit)
        except EndOfMailbox:
            assert not self.model
            assert self.is_closed or not self.ends
            return
        assert burst == expected
        assert burst or not (self.is_closed or not self.ends)
        del self.model[:limit]
        self.handled += len(burst)

    @precondition(lambda self: self.wake_ups)
    @rule()
    def the_loop_runs(self) -> None:
        self.wake_ups.popleft()()

    @precondition(lambda self: self.ends)
    @rule(which=st.integers(0, 99))
    def clone(self, which: int) -> None:
        self.ends.append(self.ends[which % len(self.ends)].clone())

    @precondition(lambda self: self.ends)
    @rule(which=st.integers(0, 99))
    def close_a_sender(self, which: int) -> None:
        self.ends.pop(which % len(self.ends)).close()

    @precondition(lambda self: not self.is_closed and len(self.model) > 2)
    @rule()
    def close_the_receiver(self) -> None:
        self.receiver.close()
        self.is_closed = True
        self.dropped += len(self.model)
        self.model.clear()

    @invariant()
    def everything_is_counted(self) -> None:
        if not hasattr(self, "receiver"):
            return
        counted = self.receiver.statistics()
        assert counted.depth == len(self.model)
        assert sum(not owed for _, owed in self.model) <= self.capacity
        assert (counted.accepted, counted.owed, counted.refused, counted.dropped, counted.handled) == (
            self.accepted,
            self.owed,
            self.refused,
            self.dropped,
            self.handled,
        )
        assert counted.senders == len(self.ends)
        assert len(self.wake_ups) <= 1


TestMailboxHistory = MailboxHistory.TestCase
TestMailboxHistory.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
