"""Runs a frozen policy: numpy only, no stable-baselines3, no pickle."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lbw_rl.action import Action, Directive, log_interpolate
from lbw_rl.controller import Context, Controller
from lbw_rl.features import FEATURES, FeatureTracker
from lbw_rl.policy import PolicyError, load_policy
from lbw_rl.registry import load_controller
from lbw_rl.signals import Telemetry
from lbw_rl.steering import Stretches, relative, steered

PRETRAINED = Path(__file__).parent / "pretrained"


def newest_pretrained(kind: str = "ppo") -> Path:
    """The newest shipped policy of a kind: the last folder of `controllers/pretrained` whose name begins with it.

    Args:
        kind: "ppo", multiples of a rule, which the name "ppo" stands for; "direct", scales of its own.

    Raises:
        PolicyError: none is shipped with this installation.
    """
    shipped = sorted(p.parent for p in PRETRAINED.glob(f"{kind}-*/policy.json"))
    if not shipped:
        raise PolicyError(
            f"policy: no frozen {kind} policy in {PRETRAINED}; train one with `lbw-rl train-policy --out DIR`"
        )
    return shipped[-1]


class FrozenPolicy(Controller):
    """A policy learned on proxies, run deterministically at its mean action.

    Its two outputs in [-1, 1] map log-linearly onto the authority that it was trained under, or onto multiples of what
    a rule proposes (`lbw_rl.steering`); the governor's own authority then clips them like any other controller's. A rule acts at its
    own pace, and the multiples hold for as many steps as the policy was trained to decide for, or through a stretch of the run
    (`lbw_rl.steering.Stretches`). Features far outside the
    training distribution are counted, and past a stated rate the header's rule-based fallback takes over for good. It
    governs from the start where the run is of a kind that can be told beforehand and that training had none of: low-rank
    adapters.

    Args:
        folder: a frozen policy; None takes the newest shipped one.
        blind_to: features that it is to see as if they had not been measured: an ablation of its inputs.
        every: optimizer steps between two of its decisions; None takes what it was trained with.

    Raises:
        PolicyError (a `ValueError`): the folder is missing, damaged, or of another schema version.
        ValueError: `blind_to` names no feature, or `every` is below 1 or no multiple of the rule's pace.
    """

    name = "ppo"
    time_limit = None

    def __init__(
        self, folder: str | Path | None = None, blind_to: Sequence[str] = (), every: int | None = None
    ) -> None:
        if unknown := [name for name in blind_to if name not in FEATURES]:
            raise ValueError(f"ppo.blind_to: {unknown[0]!r} is no feature; accepted: {', '.join(FEATURES)}")
        self._blind = [list(FEATURES).index(name) for name in blind_to]
        self.folder = Path(folder) if folder is not None else newest_pretrained()
        self.policy = load_policy(self.folder)
        self._every = self.policy.header.decide_every if every is None else every
        if self._every < 1:
            raise ValueError(f"ppo.every: {every} must be at least 1")
        self._steers = self.policy.header.relative_to != "schedule"
        pace = (self.policy.header.rule_every if self._steers else None) or self._every
        if self._every % pace:
            raise ValueError(f"ppo.every: {self._every} is no multiple of the {pace} steps that its rule acts at")
        self.decide_every, self._hold = pace, self._every // pace  # decisions of the rule to one of its own
        self._fallback = load_controller(self.policy.header.fallback.controller)
        self.reset(Context(decide_every=self.decide_every))

    def reset(self, context: Context) -> None:
        """Forgets the feature means and the out-of-distribution record."""
        self._tracker = FeatureTracker(1, context.total_steps, context.weights)
        self._recent: deque[bool] = deque(maxlen=self.policy.header.fallback.window)
        self._unfamiliar = 0
        self._fallen_back = context.low_rank and self.policy.header.fallback.adapters
        self._proposed = math.nan  # by the rule, at the decision before
        self._unit, self._unfamiliarity = (0.0, 0.0), 0.0
        self._held = 0  # decisions of the rule since the policy's own last one
        self._stretches = Stretches(1, self.policy.header.stretches)
        self._fallback.reset(context)

    def act(self, telemetry: Telemetry) -> Action:
        """The policy's mean action, or the fallback's once that has taken over."""
        header = self.policy.header
        signals = telemetry.as_dict()
        seen = self._relative(signals) if self._steers else signals
        rule = self._fallback.act(telemetry)  # kept warm, so that a hand-over has its baselines
        self._proposed = rule.lr_scale
        if self._held == 0:
            self._look(seen)
        self._held = (self._held + 1) % self._hold
        if self._fallen_back:
            return rule
        evidence = {
            "action_lr": self._unit[0],
            "action_momentum": self._unit[1],
            "unfamiliarity": self._unfamiliarity,
        }
        regime = "learned-unfamiliar" if self._unfamiliarity > header.fallback.feature_z else "learned"
        if self._steers:
            action = steered(rule, self._unit, header.reach)
            if action.directive is Directive.PROCEED:
                return replace(action, regime=regime, evidence={**rule.evidence, **evidence})
            return action
        return Action(
            lr_scale=log_interpolate(self._unit[0], header.authority.lr_scale),
            momentum_scale=log_interpolate(self._unit[1], header.authority.momentum_scale),
            regime=regime,
            evidence=evidence,
        )

    def _relative(self, signals: Mapping[str, Any]) -> Mapping[str, Any]:
        """As in training. A multiple that it cannot have asked for tells what was not executed, in shadow mode or under
        a narrower authority, and nothing of the run: it counts as not measured."""
        seen = relative(signals, self._proposed)
        furthest = self.policy.header.reach[0] * (1 + 1e-6)
        return seen if 1 / furthest <= seen["lr_scale"] <= furthest else {**seen, "lr_scale": math.nan}

    def _look(self, signals: Mapping[str, Any]) -> None:
        """The policy's own decision, and whether it was asked about something that it knows."""
        fallback = self.policy.header.fallback
        features = self._tracker(signals)[0]
        begins = bool(self._stretches(features[None])[0])
        features[self._blind] = 0.0
        self._unfamiliarity = float((np.abs(features - self.policy.mean) / self.policy.std).max())
        unfamiliar = self._unfamiliarity > fallback.feature_z
        self._unfamiliar += unfamiliar
        self._recent.append(unfamiliar)
        if len(self._recent) == fallback.window and sum(self._recent) / fallback.window > fallback.rate:
            self._fallen_back = True
        if begins:
            lr, momentum = (float(a) for a in self.policy.action(features))
            self._unit = (lr, momentum)

    def state_dict(self) -> dict[str, Any]:
        """Feature means, out-of-distribution record and the fallback's own state."""
        return {
            "policy": self.policy.fingerprint,
            "tracker": self._tracker.state_dict(),
            "recent": list(self._recent),
            "unfamiliar": self._unfamiliar,
            "fallen_back": self._fallen_back,
            "proposed": self._proposed if math.isfinite(self._proposed) else None,
            "unit": list(self._unit),
            "unfamiliarity": self._unfamiliarity,
            "held": self._held,
            "stretches": self._stretches.state_dict(),
            "fallback": self._fallback.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`.

        Raises:
            ValueError: it is the state of another policy.
        """
        if state.get("policy", self.policy.fingerprint) != self.policy.fingerprint:
            raise ValueError(
                f"state: is of another policy ({state['policy'][:12]}…) than {self.folder} holds now "
                f"({self.policy.fingerprint[:12]}…); accepted: the same policy, or a new run"
            )
        self._tracker.load_state_dict(state["tracker"])
        self._recent = deque(state["recent"], maxlen=self.policy.header.fallback.window)
        self._unfamiliar, self._fallen_back = state["unfamiliar"], state["fallen_back"]
        self._proposed = math.nan if state["proposed"] is None else state["proposed"]
        self._unit = (float(state["unit"][0]), float(state["unit"][1]))
        self._unfamiliarity, self._held = state["unfamiliarity"], state["held"]
        self._stretches.load_state_dict(state["stretches"])
        self._fallback.load_state_dict(state["fallback"])

    def summary(self) -> dict[str, Any]:
        """Decisions with an unfamiliar feature, and whether the fallback took over."""
        return {"unfamiliar_decisions": self._unfamiliar, "fallback_active": self._fallen_back}
