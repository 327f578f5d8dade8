"""What the processes below one process are, and what CPU time they have used: read from /proc, without any package."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

TICK = os.sysconf("SC_CLK_TCK")


class Seen(NamedTuple):
    """A process: its name as Ray titles it, its parent, and CPU seconds (user and system, with those of reaped children)."""

    name: str
    parent: int
    cpu_s: float


def all_processes() -> dict[int, Seen]:
    """Every process of the host by pid."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat, line = (entry / "stat").read_text(), (entry / "cmdline").read_bytes()
        except OSError:
            continue  # it ended meanwhile
        fields = stat[stat.rindex(")") + 2 :].split()
        name = line.replace(b"\0", b" ").decode(errors="replace").strip() or stat[stat.index("(") + 1 : stat.rindex(")")]
        found[int(entry.name)] = Seen(name, int(fields[1]), sum(map(int, fields[11:15])) / TICK)
    return found


def below(root: int, *also: int) -> dict[int, Seen]:
    """The process `root`, those of `also`, and all their descendants."""
    everything = all_processes()
    children = defaultdict(list)
    for pid, seen in everything.items():
        children[seen.parent].append(pid)
    found, waiting = {}, [root, *also]
    while waiting:
        pid = waiting.pop()
        if pid in everything and pid not in found:
            found[pid] = everything[pid]
            waiting += children[pid]
    return found


def replicas(application: str, deployment: str) -> list[int]:
    """The pids of a deployment's replicas, of the Ray that this process has started. One may be missing that titles itself just then."""
    title = f"ray::ServeReplica:{application}:{deployment}"
    titled = {pid: seen.name.split(" ")[0] for pid, seen in below(os.getpid()).items()}
    return sorted(pid for pid, name in titled.items() if name == title or name.startswith(f"{title}."))
