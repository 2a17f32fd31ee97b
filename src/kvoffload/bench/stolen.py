"""CPU time that a hypervisor gave to others while this machine asked for it: what explains an outlier that is nobody's fault here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class MachineTime:
    """Of all processors since the start, in ticks: ``wanted`` is what ran or was to run, ``stolen`` is part of it."""

    wanted: int
    stolen: int


def machine_time(stat: Path = Path("/proc/stat")) -> MachineTime | None:
    """Now. None where the kernel does not tell."""
    try:
        line = stat.read_text().partition("\n")[0]
    except OSError:
        return None
    # user, nice, system, idle, iowait, irq, softirq, steal; what guests got follows, and is in user and nice already.
    fields = line.split()[1:9]
    if not line.startswith("cpu ") or len(fields) < 8:
        return None
    ticks = [int(field) for field in fields]
    return MachineTime(wanted=sum(ticks) - ticks[3] - ticks[4], stolen=ticks[7])


def stolen_share(before: MachineTime | None, after: MachineTime | None) -> float | None:
    """What share of the wanted time between the two was stolen. None where that cannot be told."""
    if before is None or after is None or after.wanted <= before.wanted:
        return None
    return (after.stolen - before.stolen) / (after.wanted - before.wanted)
