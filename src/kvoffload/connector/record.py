"""What SchedulerSide remembers of one live request: its keys, how far it is saved, and what was answered about it."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from kvoffload.messages import PrefixHit

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from kvoffload.keys import Extras, KeyChain


class Phase(Enum):
    """What is known of the request's prefix in L1.

    ::

        NEW --asked--> ASKED --hit--> HELD --vLLM allocated--> USED or SPENT
         ^               |--miss, deadline--> SPENT              |
         '--expired, reset-- HELD, ASKED      USED, SPENT --preempted--> NEW (a failed load: SPENT for good)
    """

    NEW = "new"
    ASKED = "asked"
    HELD = "held"
    SPENT = "spent"
    USED = "used"


class RequestRecord:
    """The facade's memory of one request, from `on_new_request` to `request_finished`."""

    __slots__ = (
        "answered",
        "asked_at",
        "chain",
        "deadline",
        "extras",
        "has_credit",
        "has_waited",
        "hit",
        "is_live",
        "load_failed",
        "local_tokens",
        "may_load",
        "may_save",
        "next_full",
        "phase",
        "preemptions",
        "prompt_tokens",
        "reoffered_at",
        "request",
        "request_id",
        "saved_blocks",
        "sequence",
    )

    def __init__(self, request: Request, chain: KeyChain, extras: Extras, *, may_save: bool, may_load: bool) -> None:
        self.request = request
        self.request_id: str = request.request_id
        self.chain = chain
        self.extras = extras
        self.may_save = may_save
        self.may_load = may_load
        self.prompt_tokens = request.num_prompt_tokens
        self.preemptions = request.num_preemptions
        self.local_tokens = 0
        """Tokens that the engine's own cache had, block-aligned, when vLLM last asked."""
        self.is_live = False
        """Admitted, and neither finished nor preempted."""
        # -- loading
        self.phase = Phase.NEW
        self.sequence = 0
        self.answered = 0
        """The last sequence that L1 has answered."""
        self.asked_at: float | None = None
        self.deadline = 0.0
        """When there must be an answer; means something once it was asked."""
        self.hit: PrefixHit | None = None
        self.has_credit = False
        self.has_waited = False
        self.load_failed = False
        # -- saving
        self.saved_blocks = 0
        """Blocks, from the first on, that were offered to L1 or came from it."""
        self.next_full = 0
        """The number of computed tokens at which there is another block to offer."""
        self.reoffered_at: int | None = None
        """The step in which the whole prefix was last offered again."""

    def set_saved(self, blocks: int) -> None:
        self.saved_blocks = blocks
        self.next_full = (blocks + 1) * self.chain.block_size

    def refresh(self) -> bool:
        """Notice what vLLM changed without a hook: a preemption, or a session's next input. True when the answer is to be asked anew."""
        request = self.request
        changed = False
        if request.num_prompt_tokens != self.prompt_tokens:
            # A streaming session dropped its last sampled token and went on: tokens behind the computed ones are other ones now.
            self.prompt_tokens = request.num_prompt_tokens
            self.chain.recut(0)
            changed = True
        if request.num_preemptions != self.preemptions:
            self.preemptions = request.num_preemptions
            self.set_saved(0)
            changed = True
        return changed

    def extend_keys(self, num_tokens: int) -> None:
        """Derive the keys of the full blocks among the first ``num_tokens`` tokens."""
        if num_tokens // self.chain.block_size > len(self.chain.keys):
            self.chain.extend(self.request._all_token_ids, self.extras, num_tokens)
