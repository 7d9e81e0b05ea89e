"""Which ranks the others wait for in a hang, by torch's flight recorder: the calls of each process group, their states.

On a GPU a collective returns as soon as it is enqueued, so Python's stacks do not tell who waits for whom. The recorder
does, with gloo as with NCCL. Its private names and the format of its dumps are those of torch 2.13 (dump version 2.10,
torch/csrc/distributed/c10d/FlightRecorderDetail.hpp).
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch._C import _distributed_c10d as c10d

REMEMBERED = 2000
"""Calls that the recorder of a process remembers, of all groups together."""
KEPT = 20
"""Unfinished calls that are kept of a dump, per group."""

Dump = dict[str, Any]


def switch_on() -> None:
    """Make this process record; call it before the process group is created."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(REMEMBERED))


def dump() -> Dump | None:
    """What this process has recorded, without most of the finished calls; None: it recorded nothing.

    Of CUDA it only queries events. Any thread may call it; it holds the GIL meanwhile.
    """
    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):  # the first where torch is built with CUDA
        call = getattr(c10d, name, None)
        found = json.loads(call()) if call else {}
        if found.get("entries"):
            return shortened(found)
    return None


def shortened(found: Dump) -> Dump:
    """Each group's last finished, first unfinished and last unfinished calls; `whole`: the recorder dropped none."""
    done = {_call(entry) for entry in found["entries"] if _finished(entry)}
    kept: dict[str, list[Dump]] = {}
    last: dict[tuple[str, bool, bool], Dump] = {}
    for entry in found["entries"]:
        group = entry["process_group"][0]
        last[group, entry["is_p2p"], _call(entry) in done] = entry
        # The parts of a coalesced call are never marked as finished themselves.
        if _call(entry) not in done and len(kept.setdefault(group, [])) < KEPT:
            kept[group].append(entry)
    chosen = {entry["record_id"]: entry for entries in (*kept.values(), last.values()) for entry in entries}
    rest = {key: found.get(key, {}) for key in ("version", "pg_config", "pg_status")}
    whole = found["entries"][0]["record_id"] == 0
    return rest | {"whole": whole, "entries": [chosen[number] for number in sorted(chosen)]}


def _call(entry: Dump) -> tuple[str, bool, int]:
    p2p = entry["is_p2p"]
    return entry["process_group"][0], p2p, entry["p2p_seq_id" if p2p else "collective_seq_id"]


def _finished(entry: Dump) -> bool:
    # gloo's calls are retired, never `completed`; a call of NCCL that is retired but not completed has timed out.
    return entry["state"] == "completed" or (entry["retired"] and _by_gloo(entry))


def _by_gloo(entry: Dump) -> bool:
    return bool(entry["profiling_name"].startswith("gloo:"))


class Waiting(NamedTuple):
    """Attributes:
    suspects: the ranks that others wait for and that wait for nobody.
    where: the call in which the others wait, as text.
    """

    suspects: list[int]
    where: str


def waited_for(dumps: Mapping[int, Dump | None]) -> Waiting:
    """The ranks that the others wait for, as far as the recorders tell.

    A rank waits for another in a collective that it has called and the other has not, or that both have called but
    that has started on its own device only (NCCL tells under TORCH_NCCL_ENABLE_TIMING=1); and in a send or receive that
    the other has not called. A rank that is waited for may itself wait for a third: the ends of such chains are named.

    Args:
        dumps: every rank's `dump`; None: nothing is known of that rank.
    """
    said = {rank: dump for rank, dump in dumps.items() if dump}
    edges = [*_in_collectives(said), *_in_transfers(said)]
    waiting = {waiter for waiter, _, _ in edges}
    ends = [edge for edge in edges if edge[1] not in waiting]
    return Waiting(sorted({rank for _, rank, _ in ends}), ends[0][2] if ends else "")


Edge = tuple[int, int, str]
"""The rank that waits, the rank that it waits for, and the call."""


class _Group(NamedTuple):
    """A process group, as one rank sees it.

    Attributes:
        enqueued, completed: number of the last collective that was called, and of the last that finished, from 1.
        first: the recorder's entry of the first unfinished one; None: there is none, or the recorder dropped it.
        title: the group's name, and what it is for.
    """

    enqueued: int
    completed: int
    first: Dump | None
    title: str


def _in_collectives(said: Mapping[int, Dump]) -> Iterator[Edge]:
    groups = {rank: _groups(dump) for rank, dump in said.items()}
    for name in sorted({name for of_rank in groups.values() for name in of_rank}):
        seen = {rank: of_rank[name] for rank, of_rank in groups.items() if name in of_rank}
        for rank in _members(said, name):
            if rank in said and rank not in seen and said[rank]["whole"]:
                seen[rank] = _Group(0, 0, None, "")
        for rank, mine in seen.items():
            for other, its in seen.items():
                behind = its.enqueued <= mine.completed < mine.enqueued
                not_begun = mine.completed == its.completed and _state(mine) == "started" and _state(its) == "scheduled"
                if behind or not_begun:
                    call = mine.first["profiling_name"].split(":")[-1] if mine.first else "collective"
                    yield rank, other, f"{call} {mine.completed + 1} of group {mine.title}"


def _state(group: _Group) -> str:
    return group.first["state"] if group.first else ""


def _groups(dump: Dump) -> dict[str, _Group]:
    """The groups that have a collective in a dump, by name."""
    calls: dict[str, list[Dump]] = {}
    for entry in dump["entries"]:
        if not entry["is_p2p"]:
            calls.setdefault(entry["process_group"][0], []).append(entry)
    found = {}
    for name, entries in calls.items():
        # The status counts calls that the recorder has dropped too; its key is an id of this process alone. Gloo's
        # counts sends and receives as well, which the recorder has no entries for and whose number differs by rank.
        status = {} if _by_gloo(entries[0]) else dump["pg_status"].get(str(entries[0]["pg_id"]), {})
        numbers = [entry["collective_seq_id"] for entry in entries]
        done = [entry["collective_seq_id"] for entry in entries if _finished(entry)]
        enqueued = max([int(status.get("last_enqueued_collective", 0)), *numbers])
        completed = max([int(status.get("last_completed_collective", 0)), 0, *done])
        first = next((entry for entry in entries if entry["collective_seq_id"] == completed + 1), None)
        what = entries[0]["process_group"][1]
        found[name] = _Group(enqueued, completed, first, name if what in ("", "undefined") else f"{name} ({what})")
    return found


def _members(said: Mapping[int, Dump], name: str) -> list[int]:
    """The ranks of a group; empty if no dump names them (gloo)."""
    for dump in said.values():
        if ranks := json.loads(dump["pg_config"].get(name, {}).get("ranks") or "[]"):
            return list(ranks)
    default = any(entry["process_group"] == [name, "default_pg"] for dump in said.values() for entry in dump["entries"])
    return list(said) if default else []


def _in_transfers(said: Mapping[int, Dump]) -> Iterator[Edge]:
    """Sends and receives whose counterpart is not pending: the other rank has not called it."""
    pending = {rank: list(_transfers(said, rank)) for rank in said}
    for rank, transfers in pending.items():
        for name, peer, call in transfers:
            if peer in said and (name, rank) not in [other[:2] for other in pending[peer]]:
                yield rank, peer, f"{call} of group {name}"


def _transfers(said: Mapping[int, Dump], rank: int) -> Iterator[tuple[str, int, str]]:
    """(group, the other rank, call) of each pending send or receive."""
    for entry in said[rank]["entries"]:
        name, call = entry["process_group"][0], entry["profiling_name"].split(":")[-1]
        # The ranks in `send 0->1` and `recv 1<-0` are ranks within the group.
        if entry["is_p2p"] and not _finished(entry) and (found := _PAIR.fullmatch(call)):
            members, peer = _members(said, name), int(found[1])
            yield name, members[peer] if peer < len(members) else peer, call


_PAIR = re.compile(r"(?:send|recv) \d+(?:->|<-)(\d+)")
