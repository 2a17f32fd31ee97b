"""Random life of an engine, by seed: requests, aborts, resets and faults against a real vLLM scheduler, with no model and in no time.

``run(seed)`` plays one life and raises `OracleError` where anything goes wrong, with the seed and the story in the error's notes::

    python -m kvoffload.testing.harness 17        # one seed, verbosely
    python -m kvoffload.testing.harness 0 2000    # seeds 0 to 1999
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from kvoffload.connector.scheduler_side import SchedulerSide
from kvoffload.connector.worker_side import WorkerSide
from kvoffload.testing.sim.engine import make_request
from kvoffload.testing.sim.settings import BLOCK_SIZE, SimSettings, draw_settings
from kvoffload.testing.sim.simulation import MakeSchedulerSide, MakeWorkerSide, Simulation
from kvoffload.testing.sim.trace import OracleError

__all__ = ["Life", "OracleError", "Outcome", "SimSettings", "draw_settings", "run"]

LONGEST_PROMPT = 11 * BLOCK_SIZE
MOST_GENERATED = 40


@dataclass
class Outcome:
    """What happened in a life, for those who want to know that something did."""

    steps: int = 0
    checked_tokens: int = 0
    promised_tokens: int = 0
    loads: Counter[str] = field(default_factory=Counter)
    saved_blocks: int = 0
    preemptions: int = 0
    aborts: int = 0
    resets: int = 0
    """Those that succeeded, so that the weights changed."""
    failed_hooks: int = 0
    sessions: int = 0
    """Inputs of streaming sessions, after the first."""
    evictions: int = 0
    drops: Counter[str] = field(default_factory=Counter)
    zeros: Counter[str] = field(default_factory=Counter)

    def __iadd__(self, other: Outcome) -> Outcome:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self


class Life:
    """Acts upon a `Simulation` at random. Every draw comes from the simulation's own generator."""

    def __init__(self, simulation: Simulation) -> None:
        self.simulation = simulation
        self._rng = simulation.rng
        self.aborts = self.inputs = 0
        self._number = 0
        self._sessions: set[str] = set()
        self._documents = [[self._rng.randrange(100, 1000) for _ in range(LONGEST_PROMPT)] for _ in range(5)]
        simulation_actions: list[tuple[float, Callable[[], None]]] = [
            (30, simulation.step),
            (8, self._steps),
            (12, self._add),
            (2, self._abort),
            (2, self._feed_session),
            (0.6, self._reset),
            (4, self._clear_engine_cache),
            (0.5, self._wait),
        ]
        if simulation.settings.faults:
            simulation_actions += [
                (1.5, self._change_live),
                (1.5, self._change_frozen),
                (3, self._change_load_hold),
                (1.5, self._change_save_hold),
                (0.03, simulation.crash_copies),
                (0.03, simulation.kill_hub),
            ]
        self._weights = [weight for weight, _ in simulation_actions]
        self._actions = [action for _, action in simulation_actions]

    def live(self) -> None:
        """All actions, then the end."""
        for _ in range(self.simulation.settings.actions):
            self._rng.choices(self._actions, self._weights)[0]()
        for name in sorted(self._sessions):
            self._end_session(name)
        self.simulation.finish()

    # ------------------------------------------------------------ requests

    def _steps(self) -> None:
        for _ in range(self._rng.randrange(2, 10)):
            self.simulation.step()

    def _add(self) -> None:
        rng = self._rng
        if len(self.simulation.scheduler.requests) >= 12:
            return
        self._number += 1
        name = f"r{self._number}"
        salt = rng.choices([None, "a", "b", "?", "?2"], [10, 2, 2, 1, 1])[0]
        opt_outs: dict[str, object] | None = None
        if rng.random() < 0.15:
            opt_outs = {"save": rng.random() < 0.5, "load": rng.random() < 0.5}
        resumable = rng.random() < 0.12
        request = make_request(
            name,
            self._prompt(),
            rng.choice([1, 1, 3, 17, MOST_GENERATED]),
            salt=salt,
            priority=rng.randrange(3) if self.simulation.settings.priority else 0,
            resumable=resumable,
            kvoffload=opt_outs,
            skip_reading=rng.random() < 0.05,
        )
        if resumable:
            self._sessions.add(name)
        self.simulation.add(request)

    def _prompt(self) -> list[int]:
        """A shared prefix, or what an earlier request ended with; its length likes to be near a multiple of the block size."""
        rng = self._rng
        ended = self.simulation.ended
        start = rng.choice(ended) if ended and rng.random() < 0.35 else rng.choice(self._documents)
        length = rng.randrange(0, LONGEST_PROMPT // BLOCK_SIZE + 1) * BLOCK_SIZE + rng.choice([-1, 0, 0, 1, rng.randrange(BLOCK_SIZE)])
        prompt = start[: max(1, min(length, LONGEST_PROMPT))]
        if rng.random() < 0.3:
            prompt = [*prompt, *(rng.randrange(100, 1000) for _ in range(rng.choice([1, BLOCK_SIZE, 2 * BLOCK_SIZE])))]
        return prompt[:LONGEST_PROMPT]

    def _abort(self) -> None:
        names = sorted(self.simulation.scheduler.requests)
        if names:
            name = self._rng.choice(names)
            self._sessions.discard(name)
            self.aborts += 1
            self.simulation.abort(name)

    def _feed_session(self) -> None:
        self._sessions &= set(self.simulation.scheduler.requests)
        if not self._sessions:
            return
        name = self._rng.choice(sorted(self._sessions))
        request = self.simulation.scheduler.requests[name]
        if request.is_finished():
            return
        more = self._rng.choice([1, 5, BLOCK_SIZE, 3 * BLOCK_SIZE])
        queued = len(request.streaming_queue or ())
        if request.num_tokens + more + MOST_GENERATED > LONGEST_PROMPT + 2 * MOST_GENERATED or queued or self._rng.random() < 0.2:
            self._end_session(name)
            return
        tokens = [self._rng.randrange(100, 1000) for _ in range(more)]
        self.inputs += 1
        self.simulation.add(make_request(name, tokens, self._rng.choice([1, 5, 20]), salt=request.cache_salt, resumable=True))

    def _end_session(self, name: str) -> None:
        self._sessions.discard(name)
        request = self.simulation.scheduler.requests.get(name)
        if request is not None and not request.is_finished():
            self.simulation.add(make_request(name, [1], 1, salt=request.cache_salt))

    # ------------------------------------------------------------ resets, time and faults

    def _reset(self) -> None:
        rng = self._rng
        if rng.random() < 0.7:
            self.simulation.drain_pipeline()
        if rng.random() < 0.5:
            for _ in range(30):
                if not self.simulation.oracle.loading:
                    break
                self.simulation.step()
            self.simulation.drain_pipeline()
        self.simulation.reset(running=rng.random() < 0.6, connector=rng.random() < 0.8)

    def _clear_engine_cache(self) -> None:
        """What it held can only come from L1 now."""
        self.simulation.reset(running=self._rng.random() < 0.3, connector=False)

    def _wait(self) -> None:
        self.simulation.clock.advance(self._rng.choice([0.04, 0.3, 2.0, 20.0]))
        self.simulation.copies.expire()

    def _change_live(self) -> None:
        self.simulation.hub.live = self._mostly() and not self.simulation.copies.crashed

    def _change_frozen(self) -> None:
        self.simulation.hub.frozen = not self._mostly()

    def _change_load_hold(self) -> None:
        self.simulation.copies.hold_loads = self._rng.random() < 0.5

    def _change_save_hold(self) -> None:
        self.simulation.copies.hold_saves = not self._mostly()

    def _mostly(self) -> bool:
        return self._rng.random() < 0.8


def run(
    seed: int | SimSettings,
    *,
    scheduler_side: MakeSchedulerSide = SchedulerSide,
    worker_side: MakeWorkerSide = WorkerSide,
    prepare: Callable[[Simulation], None] | None = None,
) -> Outcome:
    """Live one life to its end. ``prepare`` may break the simulation first: negative controls do."""
    settings = draw_settings(seed) if isinstance(seed, int) else seed
    simulation = Simulation(settings, scheduler_side, worker_side)
    if prepare is not None:
        prepare(simulation)
    life = Life(simulation)
    try:
        life.live()
    except Exception as error:
        error.add_note(f"seed {settings.seed}: {settings}")
        error.add_note(simulation.trace.report(getattr(error, "tags", ())))
        raise
    statistics = simulation.core.statistics()
    return Outcome(
        steps=simulation.steps,
        checked_tokens=simulation.worker.checked_tokens,
        promised_tokens=simulation.oracle.answers_in_tokens,
        loads=Counter({outcome.name: count for outcome, count in simulation.copies.finished_loads.items()}),
        saved_blocks=simulation.copies.saved_blocks,
        preemptions=simulation.oracle.preemptions,
        aborts=life.aborts,
        resets=simulation.worker.version,
        failed_hooks=sum(len(connector.failures) for connector in simulation.connectors),
        sessions=life.inputs,
        evictions=statistics.evictions,
        drops=Counter({reason.value: count for reason, count in statistics.drops.items()}),
        zeros=Counter(simulation.side.matcher.zero_reasons),
    )


def main(arguments: list[str]) -> None:
    first = int(arguments[0]) if arguments else 0
    last = int(arguments[1]) if len(arguments) > 1 else first + 1
    total, begun = Outcome(), time.monotonic()
    for seed in range(first, last):
        total += run(seed)
    took = time.monotonic() - begun
    sys.stdout.write(f"seeds {first} to {last - 1}: {total.steps} steps, {total.steps / took:.0f} per second\n{total}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
