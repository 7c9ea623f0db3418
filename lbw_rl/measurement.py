"""From a training step to one decision's telemetry: on this process, or joined over all ranks."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lbw_rl.action import Action
from lbw_rl.clip_tap import ClipTap
from lbw_rl.device import DeviceSource
from lbw_rl.exchange import Exchange
from lbw_rl.observer import Observer, Window
from lbw_rl.probe import SCALARS, SEGMENTS, Packed, Probe
from lbw_rl.sgd_rate import RateMeter, Terms, as_terms
from lbw_rl.signals import NAN, SIGNALS, Telemetry
from lbw_rl.transfer import Transfer

Vector = NDArray[np.float32]
Fault = Callable[[str, Exception], None]

log = logging.getLogger("lbw_rl")

_SOURCED_HERE = tuple(
    name for name, s in SIGNALS.items() if s.source in ("clock", "device") and name != "collective_seconds"
)


@dataclass(frozen=True, slots=True)
class Measured:
    """One decision's telemetry and what came with it.

    Attributes:
        telemetry: the same on every rank.
        nonfinite_ranks: ranks whose own loss, gradient or update was not finite; empty for a process alone.
        votes: per rank, what the caller sent along; shape (ranks, votes).
        late: whether the telemetry is that of the decision before.
    """

    telemetry: Telemetry
    nonfinite_ranks: tuple[int, ...] = ()
    votes: Vector = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    late: bool = False


@dataclass(slots=True)
class _Pending:
    """Measurements on their way to the host."""

    transfer: Transfer | None
    packed: Packed | None
    known: dict[str, float]
    terms: Terms | None = None

    def values(self) -> dict[str, Vector]:
        if self.transfer is None or self.packed is None:
            return {}
        return self.packed.unpack(self.transfer.result())


class Measurement:
    """Reads loss, gradients, updates, clock and device once per decision.

    Every signal can be lost to a fault and is then missing; the fault is reported, and the rest goes on. With ranks,
    all of them enter one collective per decision, whatever each of them could measure.

    Args:
        optimizer: whose step is measured.
        model: whose forward pass tells loss and tokens where the caller does not.
        fault: told (source, error).
        exchange: joins the ranks; None for a process alone.
        late: whether a decision uses the measurements of the one before, so that nothing waits for the device.
        device_index: which GPU; see `DeviceSource`.
        clock_and_device: whether their signals are measured; without them a run repeats bit for bit.
        scaler: the `GradScaler`, for its factor.
        group_entropy: name of the entropy estimator that is also taken of each parameter group alone; None for none.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module | None,
        fault: Fault,
        *,
        exchange: Exchange | None = None,
        late: bool = False,
        device_index: int | None = None,
        clock_and_device: bool = True,
        scaler: Any = None,
        group_entropy: str | None = None,
    ) -> None:
        self.observer = Observer(model, fault)
        self.probe = Probe(optimizer, answers=exchange is None or exchange.rank == 0, group_entropy=group_entropy)
        self.rate_meter = RateMeter(optimizer, self.probe)
        self.exchange, self.late = exchange, late
        self._fault = fault
        self._scaler = scaler
        self._clock_and_device = clock_and_device
        self._device = DeviceSource(device_index) if clock_and_device else None
        self._tap = ClipTap(optimizer, self.observer.grad_norm)
        self._pending: _Pending | None = None
        self.bad: torch.Tensor | None = None
        """0-d, on the device: whether the step measured last has a loss or gradient that is not finite."""

    def take(self, known: Mapping[str, float], votes: Vector, step: int) -> Measured:
        """Measures the step at hand and ends the window.

        Args:
            known: signals that the governor knows.
            votes: numbers that every rank is to see of this one; same length everywhere.
            step: for messages.

        Raises:
            PeerLostError: a rank is gone.
        """
        current = self._measure(dict(known))
        due = self._pending if self.late else current
        self._pending = current if self.late else None
        values: dict[str, Vector] = {}
        if due is not None:
            try:
                values = due.values()
            except Exception as e:  # the device has failed; the run will notice
                self._fault("probe", e)
        signals = dict(due.known) if due is not None else dict(known)
        if self.exchange is None:
            return replace(self._alone(signals, values, due), votes=votes[np.newaxis])
        return self._joined(signals, values, due, votes, step)

    def poisoned_now(self) -> bool:
        """Whether the step at hand, between two decisions, has a loss or gradient that is not finite.

        Asked only where the answer costs no sync and is the same on every rank: on the CPU, and with ranks from
        replicated gradients alone.
        """
        if self.late or self.probe.sharded:
            return False
        try:
            packed = self.probe.pack_scalars(*self.observer.peek(alone=self.exchange is None))
            return bool(_not_finite(packed))
        except Exception as e:
            self._fault("probe", e)
            return False

    def flag_between(self) -> None:
        """Where nothing waits for the device, has it tell itself whether a step between two decisions is poisoned."""
        if not self.late or self.probe.sharded:
            return
        try:
            self.bad = _not_finite(self.probe.pack_scalars(*self.observer.peek(alone=self.exchange is None)))
        except Exception as e:
            self._fault("probe", e)

    def before_step(self) -> None:
        """The step at hand ends the window: its update is about to be measured, and is executed all the same if not."""
        try:
            self.probe.before_step()
        except Exception as e:
            self._fault("probe", e)

    def executed(self, action: Action) -> None:
        """Notes what the step at hand executes, with its scales written."""
        try:
            self.rate_meter.executed(action)
        except Exception as e:
            self._fault("probe", e)

    def after_step(self) -> None:
        """Ends a step, of the window's end or not."""
        try:
            self.probe.after_step()
        except Exception as e:
            self._fault("probe", e)
        self.observer.step_done()

    def forget(self) -> None:
        """After a rollback: the last step, the last gradient and what is on its way are those of another history."""
        self._pending = None
        self.probe.forget()
        self.rate_meter.forget()

    def _measure(self, known: dict[str, float]) -> _Pending:
        window = Window(None, None, None, {})
        packed = transfer = terms = None
        self.bad = None
        try:
            window = self.observer.collect(alone=self.exchange is None)
            packed = self.probe.pack(window.loss, window.step_loss, window.grad_norm, _loss_scale(self._scaler))
            transfer = Transfer(packed.values)
            terms = self.rate_meter.measured()
            if self.late:
                # With ranks the loss of one is no other's: what all have in common is the gradient.
                alone = self.exchange is None
                judged = packed if alone else self.probe.pack_scalars(None, window.grad_norm)
                self.bad = _not_finite(judged)
        except Exception as e:  # a signal that cannot be measured is missing, no more
            self._fault("probe", e)
        if self._device is not None:
            known |= window.clock
            try:
                known |= self._device.read()
            except Exception as e:
                self._fault("device", e)
        return _Pending(transfer, packed, known, terms)

    def _alone(self, signals: dict[str, float], values: dict[str, Vector], due: _Pending | None) -> Measured:
        own = {name: float(values[name][0]) for name in SCALARS if name in values}
        norms = [own[name] for name in ("norm", "shard_norm") if name in own]
        if norms:
            own["grad_norm"] = norms[0] if len(norms) == 1 else math.hypot(*norms)
        judged = [own[n] for n in ("step_loss" if "step_loss" in own else "loss", "grad_norm") if n in own]
        bad = any(not math.isfinite(v) for v in judged) or own.get("found_inf", 0.0) > 0
        told = ("loss", "grad_norm", "loss_scale", "learning_rate")
        signals |= {name: own[name] for name in told if name in own}
        if judged:
            signals["nonfinite"] = float(bad)
        groups = self._add_sampled(signals, values, due)
        return Measured(_telemetry(signals, groups), late=self.late)

    def _joined(
        self, signals: dict[str, float], values: dict[str, Vector], due: _Pending | None, votes: Vector, step: int
    ) -> Measured:
        assert self.exchange is not None
        n = self.probe.sample_size
        scalars = np.array([float(values[s][0]) if s in values else 0.0 for s in SCALARS], np.float32)
        present = np.array([s in values for s in (*SCALARS, *SEGMENTS)], np.float32)
        sourced = np.array([signals.get(name, NAN) for name in _SOURCED_HERE], np.float32)
        row = np.concatenate([scalars, present, sourced, votes])
        sample = np.concatenate([values[s] if s in values else np.zeros(n, np.float32) for s in SEGMENTS])
        table, sample = self.exchange(row, sample, step)
        cuts = np.cumsum([len(SCALARS), len(SCALARS) + len(SEGMENTS), len(_SOURCED_HERE)])
        scalars, present, sourced, votes = np.split(table, cuts, axis=1)
        column = dict(zip(SCALARS, np.where(present[:, : len(SCALARS)] > 0, scalars, np.nan).T))
        seen = dict(zip((*SCALARS, *SEGMENTS), (present > 0).T))
        joined = {s: part for s, part in zip(SEGMENTS, np.split(sample, len(SEGMENTS))) if seen[s].all()}
        if seen["steps_taken"].any():
            joined["steps_taken"] = column["steps_taken"][seen["steps_taken"]][:1]
        with np.errstate(all="ignore"):
            latest = np.where(seen["step_loss"], column["step_loss"], column["loss"])
            lost = seen["loss"] & ~np.isfinite(latest)
            poisoned = np.zeros_like(lost)
            for name in ("norm", "shard_norm"):
                poisoned = poisoned | (seen[name] & ~np.isfinite(column[name]))
            if (seen["norm"] | seen["shard_norm"]).all() and not poisoned.any():
                lost = np.zeros_like(lost)  # of a batch that the loop dropped: no gradient has it
            bad = lost | poisoned
            bad = bad | seen["found_inf"] & (column["found_inf"] > 0)
            if seen["loss"].any():
                signals["loss"] = float(column["loss"][seen["loss"]].astype(np.float64).mean())
            norms = np.concatenate([column[name][seen[name]] for name in ("norm", "shard_norm")]).astype(np.float64)
            if norms.size:
                signals["grad_norm"] = math.hypot(*norms)
            for name in ("loss_scale", "learning_rate"):
                if seen[name].any():
                    signals[name] = float(column[name][seen[name]][0])
            if seen["loss"].any() or norms.size:
                signals["nonfinite"] = float(bad.any())
            for name, values_of in zip(_SOURCED_HERE, sourced.T):
                known = values_of[np.isfinite(values_of)]
                signals[name] = float(known.astype(np.float64).mean()) if known.size else NAN
        if self._clock_and_device:
            signals["collective_seconds"] = self.exchange.seconds
        groups = self._add_sampled(signals, joined, due)
        # One rank's loss has poisoned the gradients of all: it is the one to look at.
        guilty = lost if lost.any() else bad
        return Measured(_telemetry(signals, groups), tuple(np.flatnonzero(guilty).tolist()), votes, self.late)

    def _add_sampled(
        self, signals: dict[str, float], values: Mapping[str, Vector], due: _Pending | None
    ) -> tuple[float, ...]:
        """Adds what the sample tells of the whole, and returns what it tells of each parameter group."""
        if due is None or due.packed is None:
            self.rate_meter.missed()
            return ()
        try:
            signals["sgd_rate"] = self.rate_meter.rate(values, due.terms)
            sampled = self.probe.signals(values, due.packed.beta2, due.packed.eps)
            groups = self.probe.group_entropies(values["gradient"]) if "gradient" in values else ()
        except Exception as e:
            self._fault("probe", e)
            return ()
        signals |= sampled
        if "gradient" in values and not signals.get("nonfinite") and math.isfinite(sampled["grad_entropy"]):
            self.probe.remember(values["gradient"])
            self.rate_meter.kept()
        return groups

    def state_dict(self) -> dict[str, Any]:
        """What the next decision depends on, as JSON data and tensors."""
        pending = self._pending
        return {
            "observer": self.observer.state_dict(),
            "probe": self.probe.state_dict(),
            "rate_meter": self.rate_meter.state_dict(),
            "pending": None
            if pending is None or pending.transfer is None or pending.packed is None
            else {
                "values": torch.from_numpy(pending.transfer.result().copy()),
                "present": list(pending.packed.present),
                "segment": pending.packed.segment,
                "beta2": pending.packed.beta2,
                "eps": pending.packed.eps,
                "known": pending.known,
                "terms": pending.terms,
            },
        }

    def load_state_dict(self, state: Mapping[str, Any], *, own: bool = True) -> None:
        """Restores `state_dict`, after the optimizer's own state has been loaded.

        Args:
            state: what `state_dict` returned.
            own: whether this rank saved it. Ranks add up what each of them answers for: the part of another must not
                count twice.
        """
        self.observer.load_state_dict(state["observer"])
        self.probe.load_state_dict(state["probe"], own=own)
        self.rate_meter.load_state_dict(state["rate_meter"])
        saved = state["pending"]
        self._pending = None
        # With ranks nobody knows whether all have theirs: none uses it, and the first decision sees nothing measured.
        if saved is not None and self.late and self.exchange is None:
            values = saved["values"].cpu()
            packed = Packed(values, tuple(saved["present"]), saved["segment"], saved["beta2"], saved["eps"])
            self._pending = _Pending(Transfer(values), packed, dict(saved["known"]), as_terms(saved["terms"]))

    def close(self) -> None:
        """Takes the hooks off and lets go of device and ranks."""
        self.observer.close()
        self._tap.close()
        if self._device is not None:
            self._device.close()
        if self.exchange is not None:
            self.exchange.close()


def _telemetry(signals: Mapping[str, float], groups: tuple[float, ...]) -> Telemetry:
    finite = {k: v if math.isfinite(v) else NAN for k, v in signals.items()}
    return Telemetry(**finite, group_grad_entropy=groups)


def _not_finite(packed: Packed) -> torch.Tensor:
    """Whether any present scalar of the step is not finite, on the device."""
    names = {"norm", "shard_norm", "step_loss" if "step_loss" in packed.present else "loss"}
    judged = [i for i, name in enumerate(packed.present) if name in names]
    return ~packed.values[judged].isfinite().all()


def _loss_scale(scaler: Any) -> torch.Tensor | None:
    """The scaler's factor where it is, without the host transfer of `get_scale`."""
    if scaler is None or not scaler.is_enabled():
        return None
    return getattr(scaler, "_scale", None)
