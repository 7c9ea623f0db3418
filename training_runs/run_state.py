"""What a checkpoint of a run holds, put together from all ranks and given back to each of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lbw_rl.envs.ranks import Ranks
from lbw_rl.envs.task import TrainingTask
from lbw_rl.governor import Governor
from lbw_rl.random_state import capture_random_state, restore_random_state
from lbw_rl.training_runs.checkpoints import Checkpoints, read_checkpoint


def run_state(task: TrainingTask, governor: Governor, record: Mapping[str, Any], header: str | None) -> dict[str, Any]:
    """All that the rest of a run depends on, complete on the first rank; every rank calls.

    What all ranks hold alike is taken from the first one. Of the others come their random generators and what their
    governors answer for: with sharded weights, also their shards of the last good state.

    Args:
        task: what is trained.
        governor: that governs it.
        record: what the run knows about itself, plain data.
        header: the first line of the ledger, the one that no later step could write again.
    """
    ranks = task.ranks
    own = {"governor": governor.state_dict(), "random": capture_random_state()}
    snapshot = own["governor"]["snapshot"]
    if snapshot is not None and not (ranks.leads or task.sharded):
        own["governor"]["snapshot"] = {"random": snapshot["random"]}
    everyone = ranks.collected(own)
    return {
        "task": task.state_dict(),
        "governor": everyone[0]["governor"] if ranks.leads else None,
        "others": everyone[1:],
        "sharded": task.sharded,
        "record": dict(record),
        "ledger_header": header,
    }


def newest_state(checkpoints: Checkpoints, ranks: Ranks) -> dict[str, Any] | None:
    """The state of the newest good checkpoint, on every rank; None where there is none.

    The first rank finds and verifies it; the others read the same file, from a file system that they share.

    Raises:
        ValueError: a file that may be good cannot be read, on whatever rank.
    """
    found: list[dict[str, Any]] = []

    def find() -> tuple[int, Path] | None:
        newest = checkpoints.newest()
        if newest is None:
            return None
        found.append(newest[1])
        return newest[0], checkpoints.latest

    where = ranks.first(find)
    if where is None:
        return None
    step, path = where
    return ranks.together(lambda: found.pop() if found else read_checkpoint(path, step))


def give_back(state: Mapping[str, Any], task: TrainingTask) -> None:
    """Puts a state's weights, optimizer, schedule and random generators back, before a governor is built.

    On as many ranks as saved it, each gets its own generators; on another number all get the first one's.

    Raises:
        ValueError: see `TrainingTask.load_state_dict`.
    """
    task.load_state_dict(state["task"])
    own = _of_this_rank(state, task.ranks)
    if own is not None:
        restore_random_state(own["random"])


def governor_state(state: Mapping[str, Any], task: TrainingTask) -> dict[str, Any]:
    """The governor's state for this rank; to be loaded after `give_back`.

    On another number of ranks it is the first one's. What is cut by rank cannot be cut anew: with sharded weights,
    then or now, the last good state is dropped, and the first decision compares with no update before it.
    """
    own, first = _of_this_rank(state, task.ranks), dict(state["governor"])
    if own is None:
        same_number = len(state["others"]) + 1 == task.ranks.world
        return (
            first if same_number or not (task.sharded or state["sharded"]) else {**first, "rank": -1, "snapshot": None}
        )
    governor = dict(own["governor"])
    if governor["snapshot"] is not None and not state["sharded"]:
        governor["snapshot"] = {**first["snapshot"], **governor["snapshot"]}
    return governor


def _of_this_rank(state: Mapping[str, Any], ranks: Ranks) -> dict[str, Any] | None:
    """What this rank saved besides the first one; None for the first, and where another number of ranks saved."""
    others = state["others"]
    return others[ranks.rank - 1] if len(others) + 1 == ranks.world and not ranks.leads else None
