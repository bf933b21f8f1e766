"""How many cores this process may use: those of its affinity, less where a control group has a quota."""

import math
import os
from functools import cache
from pathlib import Path


def n_cores() -> int:
    """Return how many threads of this process can run at the same time."""
    ours = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return max(1, math.ceil(min(_quota(), len(ours))))


@cache
def _quota(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """Return how many cores' time Linux's control groups grant this process; infinity where they don't say.

    Parameters
    ----------
    groups
        Where the groups are mounted: version 2, or version 1 with the controller ``cpu``.
    own
        File that names the process's groups. Each lies in others, which have quotas too.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return math.inf
    quotas = [math.inf]
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounted = groups / "cpu" if controllers else groups
        group = mounted / name.lstrip("/")
        quotas += [_quota_of(part) for part in (group, *group.parents) if part.is_relative_to(mounted)]
    return min(quotas)


def _quota_of(group: Path) -> float:
    """Return the quota that is set on a group itself."""
    try:
        if (group / "cpu.max").exists():
            granted, period = (group / "cpu.max").read_text().split()
        else:
            granted, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
    except OSError:
        return math.inf
    return math.inf if granted.strip() in ("max", "-1") else int(granted) / int(period)
