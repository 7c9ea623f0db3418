"""The only writer of `param_groups`: base × scale just before the step, restored right after."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch

from lbw_rl.action import Action, Directive
from lbw_rl.hand_over import prepare
from lbw_rl.momentum import momentum_of


def scaled_decay(decay: float, scale: float) -> float:
    """A momentum coefficient whose averaging horizon 1/(1−β) is `scale` times as long.

    1−β′ = (1−β)/scale, so β′ < 1 for every β < 1 and scale > 0 (β × 1.2 would give 0.9 → 1.08). A horizon
    shorter than one step is no momentum: β′ ≥ 0. β = 0 stays 0: there is no average to stretch.
    """
    if decay == 0.0 or scale == 1.0:
        return decay
    # A horizon past what a float can hold would round to β′ = 1, which never forgets.
    return min(max(1.0 - (1.0 - decay) / scale, 0.0), math.nextafter(1.0, 0.0))


class Actuator:
    """Executes an action on an optimizer for the length of one step.

    Schedulers never see the scale: closed-form and recursive ones alike read the base value that they wrote.
    A scale of exactly 1 writes nothing, so an idle governor leaves every bit alone. A skipped step withholds
    all gradients (`grad = None`), which every torch optimizer passes over: no moment moves, no decay, no count.
    Tensor learning rates are changed in place, since a compiled step holds on to the tensor.

    Decoupled weight decay is lr × decay, so it scales with the learning rate: a run whose rate is brought back
    to the right one gets the decay of the right one too.

    A step that is handed over moves the weights here (see `hand_over`), group by group, and withholds the gradients of
    what has moved, so that no tensor moves twice and none is passed by. What can be refused is refused before the first
    weight moves. If a group fails all the same, half way through, its gradients are withheld too; the groups that have
    not moved yet follow the optimizer's own rule.

    Args:
        optimizer: to be written to.
        fault: told (source, error) of a group that failed half way.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, fault: Callable[[str, Exception], None] = lambda source, error: None
    ) -> None:
        self.optimizer = optimizer
        self._fault = fault
        self._saved: list[tuple[dict[str, Any], str, Any]] = []
        self._in_place: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._withheld: list[tuple[torch.nn.Parameter, torch.Tensor]] = []

    @torch.no_grad()
    def apply(self, action: Action, sgd_rate: float = math.nan) -> None:
        """Writes the action's scales, or withholds the gradients if it skips.

        Args:
            action: what is to be executed.
            sgd_rate: Λ, for a step that is handed over.

        Raises:
            ValueError: a step that cannot be handed over; nothing has moved then.
        """
        self.restore()  # a step that raised never reached its post hook
        groups = self.optimizer.param_groups
        if action.directive is not Directive.PROCEED:
            self._withhold([p for group in groups for p in group["params"]])
            return
        scales = [action.lr_scale * extra for extra in action.group_lr_scales or (1.0,) * len(groups)]
        self._scale_rates(list(zip(groups, scales)))
        if action.momentum_scale != 1.0:
            for group in groups:
                self._scale_momentum(group, action.momentum_scale)
        if action.hand_over:
            self._step_as_sgd(sgd_rate)

    @torch.no_grad()
    def restore(self) -> None:
        """Puts back what `apply` changed; does nothing if nothing is changed."""
        for group, key, value in self._saved:
            group[key] = value
        self._saved.clear()
        for tensor, value in self._in_place:
            tensor.copy_(value)
        self._in_place.clear()
        for parameter, gradient in self._withheld:
            if parameter.grad is None:  # else a backward pass came in between: the newer gradient stands
                parameter.grad = gradient
        self._withheld.clear()

    def _scale_rates(self, scaled: list[tuple[dict[str, Any], float]]) -> None:
        wanted: dict[int, set[float]] = {}  # torch hands a default rate to all groups as one and the same tensor
        for group, scale in scaled:
            wanted.setdefault(id(group.get("lr")), set()).add(scale)
        done: set[int] = set()
        for group, scale in scaled:
            lr: Any = group.get("lr")
            if isinstance(lr, torch.Tensor) and len(wanted[id(lr)]) == 1:
                if scale != 1.0 and id(lr) not in done:
                    done.add(id(lr))
                    self._in_place.append((lr, lr.clone()))
                    lr.mul_(scale)
            elif scale != 1.0 and lr is not None:  # None: the optimizer makes its own
                self._saved.append((group, "lr", lr))
                group["lr"] = lr * scale

    def _scale_momentum(self, group: dict[str, Any], scale: float) -> None:
        found = momentum_of(group)
        if found is None:
            return
        key, decay = found
        if key == "betas":
            self._saved.append((group, key, group[key]))
            group[key] = (scaled_decay(decay, scale), *group[key][1:])
        elif decay > 0:
            self._saved.append((group, key, group[key]))
            # At exactly 0 RMSprop makes no buffer, which it misses at the next step, and SGD lets its own go stale.
            group[key] = max(scaled_decay(decay, scale), sys.float_info.min)

    def _step_as_sgd(self, rate: float) -> None:
        for step in prepare(self.optimizer, rate):
            self._withhold(step.parameters)
            try:
                step.execute()
            except Exception as e:  # this group's moments may have moved: the optimizer must not move them again
                self._fault("hand-over", e)
                return

    def _withhold(self, parameters: list[torch.nn.Parameter]) -> None:
        for parameter in parameters:
            if parameter.grad is not None:
                self._withheld.append((parameter, parameter.grad))
                parameter.grad = None
