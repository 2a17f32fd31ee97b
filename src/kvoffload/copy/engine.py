"""What moves bytes between engine blocks and slots, as the rest of kvoffload sees it."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvoffload.ledger import Ledger
from kvoffload.segment import Segment

Ids = NDArray[np.int64]
"""Numbers of blocks or slots, one-dimensional."""


class CopyEngine(Protocol):
    """Blocking copies. One thread may save while another loads.

    Every call checks its ids before it touches anything and raises CopyError for one out of range, arrays of different lengths, or
    a destination named twice. When a call returns, or raises, it neither reads nor writes any more.

    But for one error: EngineLost, from the call of which the device does not say whether it has ended. Its slots and blocks may be
    read and written later, so its slots must not be used again, nor any of the memory be given back, until the process has ended.
    Later calls raise CopyError and touch nothing.
    """

    name: str
    block_bytes: int
    """KV bytes of one block, without the slot's header."""
    segment: Segment
    """The slots that it copies to and from."""

    def use_ledger(self, ledger: Ledger) -> None:
        """Check saves against this ledger from the next call on: the scheduler's is known only after the layout was proven."""
        ...

    def prepare_slots(self, populated: int, *, at_start: bool = False) -> int:
        """How many slots, from the first on, may be used, given that so many are in memory. May take long; one thread at a time.

        ``at_start``: vLLM's thread waits for this, so nothing can be capturing a graph meanwhile. Else an engine that has to call the
        device for it does so only once a real step has run (the first `mark` since), and until then answers what it did before:
        ask again. Never raises for memory that the device does not take: such slots are copied more slowly.
        """
        ...

    def mark(self) -> object:
        """On vLLM's thread: a token for "everything launched so far". Does not raise: a copy after a mark that failed does."""
        ...

    def save(self, blocks: Ids, slots: Ids, epochs: Ids, after: object) -> NDArray[np.bool_]:
        """Once ``after`` has happened, copy block ``blocks[i]`` into slot ``slots[i]``, whose 64-byte header is cleared.

        Flag *i* says whether the ledger still had ``epochs[i]`` for the block after its last byte was read. One native call with
        the interpreter lock released: callers keep it to some 64 MiB so that loads can go between.
        """
        ...

    def load(self, slots: Ids, blocks: Ids, after: object) -> None:
        """Once ``after`` has happened, copy slot ``slots[i]`` into engine block ``blocks[i]``. One native call."""
        ...

    def close(self) -> None:
        """Give back what the engine holds. Nothing may be running."""
        ...
