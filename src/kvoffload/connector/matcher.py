"""How many tokens of a request L1 can give: asked once, answered within a deadline, remembered until used."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

from kvoffload.connector.ports import HubPort
from kvoffload.connector.record import Phase, RequestRecord
from kvoffload.messages import BlockKey, ForgetRequest, HitReason, MatchPrefix, PrefixHit, ReleaseHit


@dataclass(frozen=True, slots=True)
class MatchSettings:
    """Times in seconds; ``max_loads`` is the number of load credits, a place each in every rank's queue of loads.

    Asking for more tokens may take longer, by ``deadline_per_token_s`` and up to ``deadline_most_s``; ``grace_s`` is for the answer
    that L1 gives right at its deadline to get here.
    """

    deadline_s: float = 0.05
    deadline_per_token_s: float = 0.0
    deadline_most_s: float = 0.05
    grace_s: float = 0.0
    wait_idle_s: float = 0.002
    wait_busy_s: float = 0.0005
    max_loads: int = 64
    alignment_tokens: int = 1


class Matcher:
    """The loading half of SchedulerSide's decisions. All calls are on vLLM's scheduler thread.

    ``pump`` takes in what came from the hub (it calls `on_hit`).
    """

    def __init__(
        self, hub: HubPort, settings: MatchSettings, pump: Callable[[], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._hub = hub
        self._settings = settings
        self._pump = pump
        self._clock = clock
        self.tokens_per_s = 0.0
        """How fast the engine computes prompts; 0.0 where nobody told."""
        # One count for all requests: a name may come again while an answer to its last bearer is still under way.
        self._sequences = itertools.count(1)
        self.generation = 0
        self.credits = settings.max_loads
        self.zero_reasons: dict[str, int] = {}
        self.has_waited_in_vain = False
        """In this step; whoever plans the next one clears it."""

    # ------------------------------------------------------------ answering vLLM

    def answer(self, record: RequestRecord, num_computed_tokens: int, *, engine_is_idle: bool) -> int | None:
        """Tokens beyond ``num_computed_tokens`` that L1 has; None: not known yet, ask again in the next step.

        May wait for the answer, with the interpreter lock released, for the two short times in `MatchSettings`.
        """
        if record.phase is Phase.SPENT or record.phase is Phase.USED:
            return 0
        if not self._hub.is_live:
            return self._zero("off")
        if record.phase is Phase.HELD and not self.expire(record, self._clock()):
            return self._promise(record, num_computed_tokens)
        return self._ask(record, num_computed_tokens, engine_is_idle)

    def _ask(self, record: RequestRecord, num_computed_tokens: int, engine_is_idle: bool) -> int | None:
        now = self._clock()
        if record.asked_at is None:
            record.asked_at = now
            record.deadline = now + self._patience_s(record)
        if record.phase is Phase.NEW:
            keys = self._keys(record)
            if not keys:
                record.phase = Phase.SPENT
                return 0
            if not self._post(record, keys):
                return self._none_or_zero(record, "busy")
        self._await(record, now, engine_is_idle)
        if record.phase is Phase.HELD:
            return self._promise(record, num_computed_tokens)
        if record.phase is Phase.SPENT:
            return 0
        return self._none_or_zero(record, "late")

    def _patience_s(self, record: RequestRecord) -> float:
        settings = self._settings
        tokens: int = max(0, record.request.num_tokens - record.local_tokens)
        return min(settings.deadline_s + tokens * settings.deadline_per_token_s, max(settings.deadline_s, settings.deadline_most_s))

    def _keys(self, record: RequestRecord) -> tuple[BlockKey, ...]:
        """Of all full blocks but for the last token, which is always computed."""
        blocks = (record.request.num_tokens - 1) // record.chain.block_size
        record.extend_keys(blocks * record.chain.block_size)
        return tuple(record.chain.keys[:blocks])

    def _post(self, record: RequestRecord, keys: tuple[BlockKey, ...]) -> bool:
        sequence, size = next(self._sequences), record.chain.block_size
        local = record.local_tokens // size
        if not self._hub.offer(MatchPrefix(record.request_id, sequence, keys, record.deadline, local, self.tokens_per_s, size)):
            return False
        record.sequence = sequence
        record.phase = Phase.ASKED
        return True

    def _await(self, record: RequestRecord, now: float, engine_is_idle: bool) -> None:
        self._pump()
        if self.has_waited_in_vain:
            # Once per step is enough: a hub that hangs must not cost every waiting request its wait.
            return
        if engine_is_idle:
            until = now + self._settings.wait_idle_s
        elif not record.has_waited:
            record.has_waited = True
            until = now + self._settings.wait_busy_s
        else:
            return
        while record.phase is Phase.ASKED and (left := until - self._clock()) > 0:
            self._hub.wait(left)
            self._pump()
        self.has_waited_in_vain = record.phase is Phase.ASKED

    def _none_or_zero(self, record: RequestRecord, reason: str) -> int | None:
        """None while the deadline has not passed, then 0 for good."""
        if self._clock() < record.deadline + self._settings.grace_s:
            return None
        self._give_back(record)
        record.phase = Phase.SPENT
        return self._zero(reason)

    def _promise(self, record: RequestRecord, num_computed_tokens: int) -> int | None:
        tokens = self._tokens(record) - num_computed_tokens
        if tokens <= 0:
            return 0
        if not record.has_credit:
            if not self.credits:
                return self._none_or_zero(record, "busy")
            self.credits -= 1
            record.has_credit = True
        return tokens

    def _tokens(self, record: RequestRecord) -> int:
        assert record.hit is not None
        tokens = len(record.hit.slots) * record.chain.block_size
        return tokens - tokens % self._settings.alignment_tokens

    def _zero(self, reason: str) -> int:
        self.zero_reasons[reason] = self.zero_reasons.get(reason, 0) + 1
        return 0

    # ------------------------------------------------------------ what comes from the hub

    def on_hit(self, hit: PrefixHit, record: RequestRecord | None) -> None:
        """Take an answer in. One that nobody waits for any more is given back; one of an older cache generation has no lease."""
        if record is None:
            return
        record.answered = max(record.answered, hit.sequence)
        if hit.generation < self.generation:
            return
        if record.phase is not Phase.ASKED or hit.sequence != record.sequence:
            if hit.slots and hit.sequence == record.sequence:
                self._hub.owe(ReleaseHit(hit.request, hit.sequence))
            return
        if hit.slots:
            record.hit = hit
            record.phase = Phase.HELD
            return
        record.phase = Phase.SPENT
        if hit.reason is not HitReason.MISS:
            self._zero(hit.reason.name.lower())

    # ------------------------------------------------------------ ends

    def take_hit(self, record: RequestRecord) -> PrefixHit | None:
        """vLLM allocated: the hit, if one is held, now belongs to the caller, with its credit; the request is not answered again."""
        hit, record.hit = record.hit, None
        if record.phase is Phase.ASKED:
            # A late answer is given back by `on_hit`.
            record.phase = Phase.SPENT
        elif hit is not None:
            record.phase = Phase.USED
        return hit

    def return_credit(self, record: RequestRecord | None = None) -> None:
        """A load has ended, or the answer that a credit was taken for is not going to be used."""
        if record is not None:
            if not record.has_credit:
                return
            record.has_credit = False
        self.credits += 1

    def restart(self, record: RequestRecord) -> None:
        """The request was preempted, or its tokens changed: ask again when vLLM asks."""
        self._give_back(record)
        record.phase = Phase.SPENT if record.load_failed else Phase.NEW
        record.asked_at = None
        record.has_waited = False

    def expire(self, record: RequestRecord, now: float) -> bool:
        """Whether a hit was held and is too old by now: it is given back, and asked anew when vLLM asks."""
        if record.phase is not Phase.HELD or record.hit is None or now < record.hit.expires:
            return False
        self._give_back(record)
        record.asked_at = None
        return True

    def forget(self, record: RequestRecord) -> None:
        """The request ended. L1 is told where it may hold something for it: a post can cost vLLM's thread a switch of threads."""
        if record.hit is not None or record.answered < record.sequence:
            self._hub.owe(ForgetRequest(record.request_id))
        record.hit = None
        self.return_credit(record)

    def reset(self, record: RequestRecord) -> None:
        """The cache was reset, and with it every match lease: whatever is outstanding or remembered is asked again."""
        if record.phase in (Phase.ASKED, Phase.HELD):
            record.hit = None
            record.phase = Phase.NEW
            record.asked_at = None
            self.return_credit(record)

    def _give_back(self, record: RequestRecord) -> None:
        if record.hit is not None:
            self._hub.owe(ReleaseHit(record.request_id, record.sequence))
            record.hit = None
            record.phase = Phase.NEW
        self.return_credit(record)
