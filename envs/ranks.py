"""The processes that train one run together: who reads what, and how they come to the same answer."""

from __future__ import annotations

import contextlib
import itertools
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lbw_rl import launch
from lbw_rl.envs.recipe import Recipe, RecipeError
from lbw_rl.exchange import PeerLostError, reason_of

T = TypeVar("T")

_TIMEOUT = timedelta(minutes=30)
"""Of a silent rank; one that has died is noticed at once. The first rank may read, tokenise and save for minutes."""

_OF_A_LOST_RANK = (
    *("gloo/transport", "Connection reset by peer", "Connection closed by peer"),
    "remote process exited",  # nccl
)
"""What errors of DDP's and FSDP's own collectives say of a rank that is gone or silent; they have no type of their own."""

_GROUPS = itertools.count()

_SHARDED_OPTIMIZERS = ("adamw", "sgd", "schedule-free")
"""Whose update is element by element; the others' norms and sums over a tensor do not know of shards."""


@dataclass(frozen=True)
class Ranks:
    """The ranks of one run. A process alone is rank 0 of 1, and then every method is the plain thing.

    All ranks call the same methods in the same order. A rank that dies makes them raise on the others.

    Attributes:
        rank: this process' number; the first one is 0.
        world: how many there are.
        local_rank: this process' number on its machine, which is also the number of its GPU.
        talk: the group, over gloo, on which the ranks come to agreements; None for a process alone.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    talk: Any = field(default=None, repr=False)

    @property
    def leads(self) -> bool:
        """Whether this is the first rank: the one that writes files and talks."""
        return self.rank == 0

    def check(self, recipe: Recipe) -> None:
        """Whether the recipe can be trained by this many ranks.

        Raises:
            RecipeError: it cannot.
        """
        if self.world == 1:
            return
        train, optimizer = recipe.train, recipe.optimizer
        in_all = train.batch_size * train.accumulation
        if in_all % self.world:
            raise RecipeError(
                f"train.batch_size: {train.batch_size} × train.accumulation {train.accumulation} = {in_all} sequences a step "
                f"cannot be shared evenly by {self.world} ranks; accepted: a multiple of {self.world}"
            )
        if train.parallel != "fsdp":
            return
        if optimizer.name not in _SHARDED_OPTIMIZERS:
            raise RecipeError(
                f"optimizer.name: {optimizer.name!r} does not know of tensors that are sharded; accepted: "
                f"{', '.join(_SHARDED_OPTIMIZERS)}, or train.parallel = 'ddp'"
            )
        if optimizer.adaptive_clip is not None:
            raise RecipeError(
                f"optimizer.adaptive_clip: {optimizer.adaptive_clip!r} does not know of gradients that are sharded; "
                "accepted: 'none', or train.parallel = 'ddp'"
            )

    def micro_batches(self, batch: torch.Tensor, largest: int) -> tuple[torch.Tensor, ...]:
        """This rank's share of a step's rows, in equal parts: the fewest of at most `largest` rows.

        Args:
            batch: the rows of all ranks, a multiple of their number; shape (rows, …). The shares are runs of them, in the
                order of the ranks.
            largest: `train.batch_size`.
        """
        share = len(batch) // self.world
        parts = next(n for n in range(-(-share // largest), share + 1) if share % n == 0)
        return batch[self.rank * share : (self.rank + 1) * share].split(share // parts)

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks of a tensor of the run's device; the same bits on every rank."""
        if self.world == 1:
            return value
        value = value.detach().clone()
        with self._no_rank_missing():
            dist.all_reduce(value)
        return value

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean over the ranks; see `total`."""
        return value if self.world == 1 else self.total(value) / self.world

    def everybodys(self, value: T) -> list[T]:
        """What each rank has, in their order, on every rank: any plain data."""
        if self.world == 1:
            return [value]
        gathered: list[Any] = [None] * self.world
        with self._no_rank_missing():
            dist.all_gather_object(gathered, value, group=self.talk)
        return gathered

    def collected(self, value: T) -> list[T]:
        """What each rank has, in their order, on the first rank; nothing on the others, which need not hold it all."""
        if self.world == 1:
            return [value]
        gathered: list[Any] | None = [None] * self.world if self.leads else None
        with self._no_rank_missing():
            dist.gather_object(value, gathered, group=self.talk)
        return gathered or []

    def together(self, act: Callable[[], T]) -> T:
        """Runs `act` on every rank; what it raises on one of them, all raise."""
        if self.world == 1:
            return act()
        value: Any = None
        own: Exception | None = None
        try:
            value = act()
        except Exception as error:
            own = error
        first = next((error for error in self.everybodys(_portable(own)) if error is not None), None)
        if first is not None:
            raise own or first
        return value

    def in_turn(self, act: Callable[[], T]) -> T:
        """`together`, but on each machine one rank before the others, which then find what it has left in a cache."""
        if self.world == 1:
            return act()
        value = self.together(act if self.local_rank == 0 else _nothing)
        later = self.together(_nothing if self.local_rank == 0 else act)
        return value if self.local_rank == 0 else later

    def first(self, act: Callable[[], T]) -> T:
        """Runs `act` on the first rank; all return its answer, plain data, or raise what it raises."""
        if self.world == 1:
            return act()
        box = [self.together(act if self.leads else _nothing)]
        with self._no_rank_missing():
            dist.broadcast_object_list(box, src=0, group=self.talk)
        return box[0]

    @contextlib.contextmanager
    def _no_rank_missing(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise self.lost(error) from error

    def lost(self, error: Exception) -> PeerLostError:
        """What this rank says when a collective failed for want of another one."""
        return PeerLostError(
            f"rank {self.rank} of {self.world} stops, since another one is gone, or was silent for too long ({reason_of(error)})"
        )


ALONE = Ranks()
"""A process that trains by itself."""


@contextlib.contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """The ranks that a launcher has started (`torchrun`), or those of a process group that exists already.

    Gradients travel over nccl between GPUs and over gloo elsewhere. A group that is made here is given up at the end.

    Args:
        device: the recipe's `train.device`.

    Raises:
        ValueError: the launcher's variables are damaged.
        RuntimeError: the others do not come.
        PeerLostError: the block failed in a collective for want of another rank.
    """
    if not dist.is_available() or (launch.world_size() == 1 and not dist.is_initialized()):
        yield ALONE
        return
    own = not dist.is_initialized()
    if own:
        accelerated = device != "cpu" and torch.cuda.is_available()
        if accelerated and launch.local_rank() < torch.cuda.device_count():
            torch.cuda.set_device(launch.local_rank())
        store, rank, world = next(iter(dist.rendezvous("env://", timeout=_TIMEOUT)))
        # Keys of its own: what an earlier group of this process has left in the store would be taken for an answer.
        store = dist.PrefixStore(f"lbw-rl group {next(_GROUPS)}", store)
        backend = "nccl" if accelerated else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=_TIMEOUT)
    # Meshes outlive the run in caches of torch's, and with them the default group: were it the one that the last words are
    # exchanged on, a thread of gloo could still be at them when the interpreter ends, which aborts it.
    talk = dist.new_group(backend="gloo", timeout=_TIMEOUT)
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), launch.local_rank(), talk)
    try:
        yield ranks
    except RuntimeError as error:
        # A rank is gone, or about to go: giving the groups up could wait for it, and hide the reason meanwhile.
        if not isinstance(error, PeerLostError) and any(words in str(error) for words in _OF_A_LOST_RANK):
            raise ranks.lost(error) from error
        raise
    except BaseException:
        _give_up(talk, own)
        raise
    else:
        _give_up(talk, own)


def _give_up(talk: Any, own: bool) -> None:
    if dist.is_initialized():  # the caller's, where it is not our own
        dist.destroy_process_group(talk)
    if own and dist.is_initialized():
        dist.destroy_process_group()


def _nothing() -> Any:
    return None


def _portable(error: Exception | None) -> Exception | None:
    """An exception that can be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # pickling runs whatever an exception's author wrote
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
