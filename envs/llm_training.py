"""One real training run as a Gymnasium environment."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from lbw_rl.action import NEUTRAL, Action
from lbw_rl.authority import Authority
from lbw_rl.controller import Context, Controller
from lbw_rl.envs.held_out_gain import DivergenceWatch, HeldOutGain
from lbw_rl.envs.interface import DEFAULT_AUTHORITY, action_space, command, observation_space
from lbw_rl.envs.recipe import Recipe, load_recipe
from lbw_rl.envs.task import TrainingTask
from lbw_rl.features import FeatureTracker
from lbw_rl.governor import Governor
from lbw_rl.random_state import capture_random_state, restore_random_state
from lbw_rl.signals import Telemetry
from lbw_rl.trainable import trainable


class LLMTrainingEnv(gymnasium.Env[NDArray[np.float32], NDArray[np.float32]]):
    """
    ## Description

    One training run of a causal language model, as a recipe describes it: model, text, optimizer, schedule. The
    agent multiplies the scheduled learning rate and the momentum's averaging horizon. It acts through
    `lbw_rl.Governor`, so that what it does here is what a deployed controller does.

    ## Action Space

    `Box(-1, 1, (2,), float32)`, mapped log-linearly onto the authority's ranges and then held to the authority
    (slew limit included). An action holds for `decide_every` optimizer steps. With ranges symmetric about 1 in
    the log, as by default, 0 is exactly neutral.

    | Num | Action                                             | Min (-1) | Neutral (0) | Max (1) |
    |-----|----------------------------------------------------|----------|-------------|---------|
    | 0   | multiple of the scheduled learning rate            | 0.01     | 1           | 100     |
    | 1   | multiple of the momentum's averaging horizon       | 0.5      | 1           | 2       |

    ## Observation Space

    `Box(-3, 3, (23,), float32)`: the feature vector (schema v3) of `lbw_rl.features`, 0 where a signal was not
    measured. Index, name and range of every feature are those of `lbw_rl/ProxyTraining-v0`; here the device
    signals are real.

    ## Rewards

    *r<sub>k</sub> = G<sub>k</sub> − G<sub>k−1</sub>*, where *G = L<sub>base</sub> − L<sub>governed</sub>* in nats
    per token on the recipe's held-out text: the base run has the same recipe and seed and is left alone. A loss
    counts as min(loss, its initial value), and one of a diverged run as the initial value. Held-out text is read
    every `evaluate_every` decisions and at the end; rewards in between are 0. The undiscounted return is the
    final held-out gain; use γ = 1. The base run is trained once per recipe, seed and evaluation interval, when
    first needed. With `base_run=False` the constant initial loss stands in for *L<sub>base</sub>*.

    ## Starting State

    The model before its first update, with the gradient of the first batch.

    ## Episode End

    - Termination: the run diverged. A loss is not finite, or the held-out loss has been above 1.5 × its initial
      value for 8 evaluations in a row. The last reward settles the base run's final loss.
    - Truncation: the recipe's optimizer steps are spent. Nothing follows: the value of that state is 0.

    ## Information

    `info["telemetry"]`: signal name → value. `info["held_out_loss"]`: nats per token, of the last evaluation.
    `info["gain"]`: *G*. `info["lr_scale"]`, `info["momentum_scale"]`: what was executed.

    ## Arguments

    - `recipe`: name of a recipe, path of a TOML file, or a `Recipe`.
    - `authority`: bounds on the actions.
    - `decide_every`: optimizer steps per decision.
    - `evaluate_every`: decisions per evaluation.
    - `base_run`: whether rewards are relative to a base run.
    - `device_signals`: whether clock and device are measured; without them, same seed and actions, same bits.

    `reset(seed=s)` trains the recipe with seed s; without a seed one is drawn.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 (Gymnasium declares it so)

    def __init__(
        self,
        recipe: str | Path | Recipe = "mini-qwen2",
        *,
        authority: Authority = DEFAULT_AUTHORITY,
        decide_every: int = 2,
        evaluate_every: int = 10,
        base_run: bool = True,
        device_signals: bool = True,
    ) -> None:
        for name, value in (("decide_every", decide_every), ("evaluate_every", evaluate_every)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self.spec = gymnasium.spec("lbw_rl/LLMTraining-v0")  # says that a clock is no deterministic observation
        self.recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
        self.action_space, self.observation_space = action_space(), observation_space()
        self.authority, self.decide_every, self.evaluate_every = authority, decide_every, evaluate_every
        self.base_run, self.device_signals = base_run, device_signals
        self._commanded = _Commanded()
        self._run: _GovernedRun | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Starts the recipe anew; `options` has no entries."""
        super().reset(seed=seed)
        run_seed = int(self.np_random.integers(2**31)) if seed is None else seed
        self.close()
        recipe = self.recipe.model_copy(update={"train": self.recipe.train.model_copy(update={"seed": run_seed})})
        self._run = _GovernedRun(recipe, self._commanded, self.authority, self.decide_every, self.device_signals)
        self._features = FeatureTracker(
            1, float(self._run.task.total_steps), trainable(self._run.task.optimizer).weights
        )
        self._gain, self._watch = HeldOutGain(1), DivergenceWatch(1)
        self._held_out = self._run.task.evaluate()
        self._gain.reset([0], np.array([self._held_out]))
        return self._observe()

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Executes an action for `decide_every` optimizer steps, fewer at the very end.

        Raises:
            RuntimeError: before `reset`.
            ValueError: an action of another shape, or NaN.
        """
        if self._run is None:
            raise RuntimeError("step called before reset")
        if np.shape(action) != self.action_space.shape:
            raise ValueError(f"action has shape {np.shape(action)}; needed: {self.action_space.shape}")
        self._commanded.action = command(np.asarray(action), self.authority)
        self._run.advance(self.decide_every)
        task = self._run.task
        truncated = task.step >= task.total_steps
        reward, terminated = 0.0, not np.isfinite(self._run.loss)
        if truncated or terminated or task.step % (self.decide_every * self.evaluate_every) == 0:
            reward, terminated = self._evaluate()
        observation, info = self._observe()
        return observation, reward, terminated, truncated and not terminated, info

    def _evaluate(self) -> tuple[float, bool]:
        assert self._run is not None
        self._held_out = self._run.task.evaluate()
        losses = np.array([self._held_out])
        diverged = self._watch(np.array([self._run.loss]), losses, self._gain.initial)
        if self.base_run:
            curve = _base_curve(self._run.task.recipe, self.decide_every * self.evaluate_every)
            base, lost = curve[max(curve) if diverged[0] else self._run.task.step]
        else:
            base, lost = float(self._gain.initial[0]), False
        reward = self._gain.rewards(losses, diverged, np.array([base]), np.array([lost]))
        return float(reward[0]), bool(diverged[0])

    def _observe(self) -> tuple[NDArray[np.float32], dict[str, Any]]:
        assert self._run is not None
        signals = self._run.governor.measure().as_dict()
        features = self._features({name: np.array([value]) for name, value in signals.items()})
        executed = self._run.governor.executed
        info = {
            "telemetry": signals,
            "held_out_loss": self._held_out,
            "gain": float(self._gain.gain[0]),
            "lr_scale": executed.lr_scale,
            "momentum_scale": executed.momentum_scale,
        }
        return features[0].astype(np.float32), info

    def close(self) -> None:
        """Lets go of the run."""
        if self._run is not None:
            self._run.governor.close()
            self._run = None


class _Commanded(Controller):
    """Proposes what it was told."""

    name = "commanded"
    time_limit = None

    def __init__(self) -> None:
        self.action = NEUTRAL

    def reset(self, context: Context) -> None:
        """Starts neutral."""
        self.action = NEUTRAL

    def act(self, telemetry: Telemetry) -> Action:
        """The command, whatever the telemetry says."""
        return self.action


class _GovernedRun:
    """A task under a governor, always with the gradient of the step at hand in place."""

    def __init__(
        self, recipe: Recipe, controller: Controller, authority: Authority, decide_every: int, measure_device: bool
    ) -> None:
        self.task = TrainingTask(recipe)
        self.governor = Governor(
            self.task.optimizer,
            controller,
            authority=authority,
            total_steps=self.task.total_steps,
            decide_every=decide_every,
            seed=recipe.train.seed,
            measure_device=measure_device,
        )
        self._backward()

    def advance(self, steps: int) -> None:
        """Takes `steps` optimizer steps, or those that are left."""
        for _ in range(min(steps, self.task.total_steps - self.task.step)):
            self.task.advance()
            self._backward()

    def _backward(self) -> None:
        loss, norm = self.task.backward()
        self.governor.observe(loss, grad_norm=norm, tokens=self.task.tokens_per_step)
        self.loss = float(loss)


_base_curves: dict[str, dict[int, tuple[float, bool]]] = {}


def _base_curve(recipe: Recipe, every: int) -> dict[int, tuple[float, bool]]:
    """Optimizer step → (held-out loss, diverged) of the recipe left alone, every `every` steps and at the end."""
    fields = json.dumps(recipe.model_dump(mode="json"), sort_keys=True)
    key = f"{hashlib.sha256(fields.encode()).hexdigest()}/{every}"
    if key not in _base_curves:
        random_state = capture_random_state()  # the governed run goes on as if nothing had happened
        task, watch = TrainingTask(recipe), DivergenceWatch(1)
        initial = np.array([task.evaluate()])
        curve: dict[int, tuple[float, bool]] = {}
        loss, _ = task.backward()
        while task.step < task.total_steps:
            task.advance()
            loss, _ = task.backward()
            if task.step % every == 0 or task.step == task.total_steps:
                held_out = task.evaluate()
                lost = watch(np.array([float(loss)]), np.array([held_out]), initial)
                curve[task.step] = held_out, bool(lost[0])
        restore_random_state(random_state)
        _base_curves[key] = curve
    return _base_curves[key]
