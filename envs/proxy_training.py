"""Proxy training as a natively vectorised Gymnasium environment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from lbw_rl.authority import Authority
from lbw_rl.controller import Controller
from lbw_rl.envs.families.family import Family
from lbw_rl.envs.fleet import FleetShape, FloatArray
from lbw_rl.envs.governed_proxies import Arrays, GovernedProxies
from lbw_rl.envs.held_out_gain import DivergenceWatch, HeldOutGain
from lbw_rl.envs.interface import DEFAULT_AUTHORITY, action_space, observation_space
from lbw_rl.envs.proxy_runs import BatchShape, ProxyData
from lbw_rl.envs.splits import corpora_of
from lbw_rl.envs.synthetic_device import SyntheticDevice
from lbw_rl.envs.tasks import LR_ERROR, PLAIN, WELL_TUNED, Tasks, Variety, sample_tasks
from lbw_rl.features import FeatureTracker

Mask = NDArray[np.bool_]


class ProxyTrainingVectorEnv(VectorEnv[NDArray[np.float32], NDArray[np.float32], NDArray[Any]]):
    """
    ## Description

    Each sub-environment is one training run of a small model (by default a language model of Llama architecture,
    about 12,000 parameters) under AdamW, on a task drawn anew for every episode: a synthetic language or the
    characters of a text, a learning-rate schedule, betas, clipping, a horizon, and above all a learning rate that
    is wrong by up to a hundredfold either way; on request also batch size, initial scale, label noise and faults.
    The agent multiplies the scheduled learning rate and the momentum's averaging horizon. All runs are of one
    family of models and advanced as one batched program; environments of several families go side by side into
    `lbw_rl.training_runs.fleet_vec_env.FleetVecEnv`.

    ## Action Space

    `Box(-1, 1, (2,), float32)` per run, mapped log-linearly onto the authority's ranges and then held to the
    authority (`lbw_rl.authority.Authority.clip`, slew limit included). An action holds for `decide_every`
    optimizer steps. With ranges symmetric about 1 in the log, as by default, 0 is exactly neutral.

    | Num | Action                                             | Min (-1) | Neutral (0) | Max (1) |
    |-----|----------------------------------------------------|----------|-------------|---------|
    | 0   | multiple of the scheduled learning rate            | 0.01     | 1           | 100     |
    | 1   | multiple of the averaging horizon 1/(1−β1)         | 0.5      | 1           | 2       |

    With `rule`, an action is a pair of multiples of what that controller proposes for the run at every step, from 1/√2 to √2 for
    the learning-rate scale and from 0.8 to 1.25 for the momentum scale (`lbw_rl.steering`); 0 leaves the run to the rule.

    ## Observation Space

    `Box(-3, 3, (23,), float32)` per run: the feature vector (schema v3) of `lbw_rl.features`, 0 where a signal
    was not measured. It describes the step whose gradient is at hand, before its update.

    | Num | Observation        | Definition                                                  | Min | Max |
    |-----|--------------------|-------------------------------------------------------------|-----|-----|
    | 0   | progress           | 2·progress − 1                                              | -1  | 1   |
    | 1   | lr_scale           | ln(executed lr_scale) / ln 10                               | -2  | 2   |
    | 2   | momentum_scale     | ln(executed momentum_scale) / ln 2                          | -1  | 1   |
    | 3   | schedule           | 2·(scheduled lr / its maximum so far) − 1                   | -1  | 1   |
    | 4   | displacement       | ln(update_ratio · sqrt(total steps) / 0.7)                  | -3  | 3   |
    | 5   | update_ratio_trend | ln(update_ratio / its slow mean)                            | -3  | 3   |
    | 6   | weight_growth      | 2·ln(weight_rms / its first value)                          | -3  | 3   |
    | 7   | loss_level         | 2·ln(fast mean loss / first loss) + 1                       | -3  | 3   |
    | 8   | loss_trend         | (fast − slow mean loss) / mean absolute deviation           | -3  | 3   |
    | 9   | loss_jump          | (loss − slow mean) / mean absolute deviation / 2            | -3  | 3   |
    | 10  | loss_noise         | ln(mean absolute deviation / 0.02 / slow mean loss)         | -3  | 3   |
    | 11  | grad_norm_jump     | ln(grad_norm / its slow mean)                               | -3  | 3   |
    | 12  | grad_norm_level    | ln(slow mean grad_norm / first grad_norm)                   | -3  | 3   |
    | 13  | steepness          | ln(slow mean grad_norm · first weight norm / 10)             | -3  | 3   |
    | 14  | grad_entropy       | 4·grad_entropy − 2                                          | -2  | 2   |
    | 15  | grad_entropy_element | 4·grad_entropy_element − 3                                | -3  | 1   |
    | 16  | grad_agreement     | ln((1 − mean grad_entropy_direction + 0.001) / 0.01) / 2    | -2  | 3   |
    | 17  | grad_cosine        | 2·grad_cosine                                               | -2  | 2   |
    | 18  | surprise           | ln(surprise) / 2                                            | -3  | 3   |
    | 19  | nonfinite          | 1 if loss or gradient is not finite                         | 0   | 1   |
    | 20  | gpu_utilization    | 2·gpu_utilization − 1                                       | -1  | 1   |
    | 21  | gpu_memory         | 2·gpu_memory − 1                                            | -1  | 1   |
    | 22  | gpu_power          | 2·gpu_power − 1                                             | -1  | 3   |

    With `rule`, feature 1 is the executed scale in units of what the rule had proposed.

    The device signals (20–22) are random walks with gaps that have no bearing on the run, so that a policy
    learns not to lean on them.

    ## Rewards

    *r<sub>k</sub> = G<sub>k</sub> − G<sub>k−1</sub>*, where *G = L<sub>base</sub> − L<sub>governed</sub>* in nats
    per token on the task's held-out tokens. The base run has the same weights, data and settings and is left
    alone, or to the rule alone. Each loss counts as min(loss, its initial value), and a loss that is not finite as the initial value.
    The undiscounted return is therefore the final held-out gain over the base run; use γ = 1. Always-neutral
    actions earn exactly 0 at every decision. With `base_run=False` the constant initial loss stands in for
    *L<sub>base</sub>*: the same optimal policy at half the cost, with the run's own progress as its return.

    ## Starting State

    A freshly initialised model with the gradient of its first batch; `lr_scale` and `momentum_scale` are 1.

    ## Episode End

    - Termination: the run diverged. Its loss or a held-out loss is not finite, or the held-out loss has been
      above 1.5 × its initial value for 8 decisions in a row; from then on it counts as the initial value, in the
      base run too. The last reward settles what the base run would still have reached, so that an early end is
      never a way out.
    - Truncation: the run's budget of optimizer steps is spent. `progress` is observed and nothing follows, so
      the value of a truncated state is 0: do not bootstrap from it.

    Autoreset mode is `SAME_STEP`: the fleet advances in lockstep, and a finished run starts over at once.
    `info["final_obs"]` and `info["final_info"]` hold what the finished runs saw last.

    ## Information

    `info["telemetry"]`: signal name → array (num_envs,), the raw record behind the observation.
    `info["gain"]`: *G* (num_envs,). `info["initial_loss"]`: of the untrained models (num_envs,), nats per token. `info["lr_scale"]`, `info["momentum_scale"]`: what was executed.
    `info["final_info"]` has these of the finished runs, and the fields of their tasks under `"task"`.

    ## Arguments

    - `num_envs`: runs in the fleet.
    - `authority`: bounds on the actions.
    - `decide_every`: optimizer steps per decision.
    - `horizon`: shortest and longest run in optimizer steps.
    - `lr_error`, `well_tuned`: range of the learning-rate error, and the share of tasks without one.
    - `base_run`: whether a base run accompanies every governed one.
    - `rule`: the controller that actions are relative to, its name, or the folder of a frozen policy; None for the bare optimizer.
    - `shape`, `batch`: family of the models (`lbw_rl.envs.families`) and its sizes; sizes of their batches.
    - `variety`: how much the tasks differ otherwise (`lbw_rl.envs.tasks.Variety`): `PLAIN`, `WIDE`, or your own.
    - `split`: "train", "validation" or "test": disjoint families of tasks (`lbw_rl.envs.splits`).
    - `text`: path of a UTF-8 file whose characters join the training corpora.
    - `corpora`: names of `lbw_rl.envs.languages.CORPORA` instead of all that the split has; "python-source", the tokens of
      a byte-pair encoding, is read by name alone, takes a vocabulary of 512 or more, and the extra `lbw-rl[hf]`.

    `reset(seed=s)` seeds run i with s + i; a list gives one seed per run. The same seeds and actions give the
    same bits. `reset(options={"tasks": Tasks})` starts the first episode on given tasks, and
    `options={"reset_mask": mask}` restarts the masked runs alone.
    """

    metadata: dict[str, Any] = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012 (Gymnasium declares it so)

    def __init__(
        self,
        num_envs: int = 1,
        *,
        authority: Authority = DEFAULT_AUTHORITY,
        decide_every: int = 2,
        horizon: tuple[int, int] = (48, 128),
        lr_error: tuple[float, float] = LR_ERROR,
        well_tuned: float = WELL_TUNED,
        base_run: bool = True,
        rule: str | Path | Controller | None = None,
        shape: Family | None = None,
        batch: BatchShape | None = None,
        variety: Variety = PLAIN,
        split: str = "train",
        text: str | Path | None = None,
        corpora: Sequence[str] | None = None,
    ) -> None:
        for name, value in (("num_envs", num_envs), ("decide_every", decide_every)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if not decide_every <= horizon[0] <= horizon[1]:
            raise ValueError(f"horizon={horizon} must be (shortest, longest), at least decide_every={decide_every}")
        self.num_envs = num_envs
        self.single_action_space, self.single_observation_space = action_space(), observation_space()
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.authority, self.decide_every = authority, decide_every
        file = None if text is None else Path(text)
        if file is not None and not file.is_file():
            raise ValueError(f"text={text} is no file; accepted: the path of a UTF-8 text file")
        family: Family = shape or FleetShape()
        accepted = corpora_of(family.name, split, text=file is not None, tokens=True)
        if corpora is None:
            corpora = corpora_of(family.name, split, text=file is not None)
        if not corpora:
            raise ValueError(
                f"corpora: none given; accepted: one or more of {', '.join(accepted)}, or None for those that {split} tasks are drawn from by default"
            )
        for name in corpora:
            if name not in accepted:
                raise ValueError(
                    f"corpora: {name!r} makes no {split} tasks of {family.name}; accepted: {', '.join(accepted)}"
                )
        self.task_distribution: dict[str, Any] = {
            "horizon": horizon,
            "multiple": decide_every,
            "tuned_lr": family.tuned_lr,
            "lr_error": lr_error,
            "well_tuned": well_tuned,
            "model": family.name,
            "corpora": tuple(corpora),
            "variety": variety,
        }
        self._data = ProxyData(num_envs, horizon[1] + decide_every, family, batch or BatchShape(), file)
        self._governed = GovernedProxies(self._data, authority, decide_every, rule)
        self._base = GovernedProxies(self._data, authority, decide_every, rule) if base_run else None
        self._device = SyntheticDevice(num_envs)
        self._features = FeatureTracker(num_envs, 1.0, self._governed.runs.fleet.matrices)
        # The devices' are apart, so that which tasks follow does not depend on how long the runs before them lasted.
        self._generators: list[np.random.Generator] = []
        self._device_generators: list[np.random.Generator] = []
        self._seen: tuple[NDArray[np.float32], Arrays] | None = None  # last, of all runs
        self._gain = HeldOutGain(num_envs)
        self._watch, self._base_watch = DivergenceWatch(num_envs), DivergenceWatch(num_envs)

    # -- episodes ------------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Starts new episodes; see the class for `seed` and `options`.

        Raises:
            ValueError: as many seeds, tasks or mask entries as there are runs are needed.
        """
        options = options or {}
        mask = np.asarray(options.get("reset_mask", np.ones(self.num_envs, dtype=bool)))
        if mask.shape != (self.num_envs,) or mask.dtype != np.bool_ or not mask.any():
            raise ValueError(f"options['reset_mask'] must be booleans of shape ({self.num_envs},), at least one true")
        rows = [int(i) for i in np.flatnonzero(mask)]
        self._seed(seed, mask)
        observation, telemetry = self._start(rows, options.get("tasks"))
        if len(rows) < self.num_envs and self._seen is not None:  # the others go on where they are
            observation = np.where(mask[:, None], observation, self._seen[0])
            telemetry = {
                name: np.where(mask, value, self._seen[1].get(name, value)) for name, value in telemetry.items()
            }
        self._seen = observation.copy(), telemetry
        return observation, self._info(telemetry)

    def _seed(self, seed: int | Sequence[int | None] | None, mask: Mask) -> None:
        if isinstance(seed, int | np.integer):
            seed = [int(seed) + i for i in range(self.num_envs)]
        elif seed is None:
            seed = [None] * self.num_envs
        if len(seed) != self.num_envs:
            raise ValueError(f"seed: {len(seed)} seeds for num_envs={self.num_envs}; accepted: an int, or one per run")
        if not self._generators:
            self._generators = [np.random.default_rng(s) for s in seed]
            self._device_generators = [g.spawn(1)[0] for g in self._generators]
            return
        for row, s in enumerate(seed):
            if s is not None and mask[row]:  # a run that goes on keeps what its tasks are drawn with
                self._generators[row] = np.random.default_rng(s)
                self._device_generators[row] = self._generators[row].spawn(1)[0]

    def _start(self, rows: list[int], tasks: Tasks | None = None) -> tuple[NDArray[np.float32], Arrays]:
        """Starts the runs in `rows`; returns observations and telemetry, NaN in other rows' telemetry."""
        if tasks is None:
            for row in rows:
                self._data.put([row], sample_tasks(self._generators[row], 1, **self.task_distribution))
        elif len(tasks) != len(rows) or (tasks.horizon % self.decide_every).any():
            raise ValueError(
                f"options['tasks']: {len(tasks)} tasks with horizons {tasks.horizon}; needed: {len(rows)} tasks, "
                f"horizons that are multiples of decide_every={self.decide_every}"
            )
        else:
            self._data.put(rows, tasks)
        self._governed.start(rows)
        if self._base is not None:
            self._base.start(rows)
        self._device.reset(rows, self._device_generators_of(rows), self._data.tasks.dropout[rows])
        mask = np.zeros(self.num_envs, dtype=bool)
        mask[rows] = True
        self._features.reset(mask, self._data.tasks.horizon.astype(np.float64))
        self._gain.reset(rows, self._governed.runs.held_out_losses(rows))
        self._watch.reset(rows)
        self._base_watch.reset(rows)
        return self._observe(rows)

    def _device_generators_of(self, rows: Sequence[int]) -> list[np.random.Generator]:
        return [self._device_generators[row] for row in rows]

    # -- one decision --------------------------------------------------------------------------------

    def step(
        self, actions: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Executes one action per run for `decide_every` optimizer steps.

        Args:
            actions: shape (num_envs, 2).

        Returns:
            Observations, rewards, terminated, truncated, info, as the class describes them.

        Raises:
            ValueError: actions of another shape, or NaN.
        """
        if not self._generators:
            raise RuntimeError("step called before reset")
        actions = np.asarray(actions)
        if actions.shape != self.action_space.shape:
            raise ValueError(f"actions have shape {actions.shape}; needed: {self.action_space.shape}")
        self._governed.command(actions)
        self._governed.advance()
        if self._base is not None:
            self._base.command(None)
            self._base.advance()
        observations, telemetry = self._observe(range(self.num_envs))
        runs = self._governed.runs
        losses = runs.held_out_losses()
        terminated = self._watch(runs.losses, losses, self._gain.initial)
        truncated = (runs.step >= self._data.tasks.horizon) & ~terminated
        rewards = self._rewards(losses, terminated)
        info = self._info(telemetry)
        if (done := terminated | truncated).any():
            observations, info = self._restart(done, observations, info)
        self._seen = observations.copy(), info["telemetry"]
        return observations, rewards, terminated, truncated, info

    def _observe(self, rows: Sequence[int]) -> tuple[NDArray[np.float32], Arrays]:
        """Observations and the record of the step at hand, NaN but in `rows`."""
        telemetry = self._governed.telemetry(rows)
        if self._base is not None:
            self._base.telemetry(rows)  # its rules see every record once, as the governed runs' do
        for name, readings in self._device.read(list(rows), self._device_generators_of(rows)).items():
            telemetry[name] = np.full(self.num_envs, np.nan)
            telemetry[name][list(rows)] = readings
        return self._features(self._governed.observed(telemetry)).astype(np.float32), telemetry

    def _rewards(self, losses: FloatArray, diverged: Mask) -> FloatArray:
        if self._base is None:
            base, lost = self._gain.initial, np.zeros(self.num_envs, dtype=bool)
        else:
            base = self._base.runs.held_out_losses()
            lost = self._base_watch(self._base.runs.losses, base, self._gain.initial)
            if abandoned := [int(i) for i in np.flatnonzero(diverged & ~lost)]:
                base[abandoned] = self._base.left_alone(abandoned)
        return self._gain.rewards(losses, diverged, base, lost)

    def _info(self, telemetry: Arrays) -> dict[str, Any]:
        return {
            "telemetry": telemetry,
            "gain": self._gain.gain.copy(),
            "initial_loss": self._gain.initial.copy(),
            "lr_scale": np.array([a.lr_scale for a in self._governed.executed]),
            "momentum_scale": np.array([a.momentum_scale for a in self._governed.executed]),
        }

    def _restart(
        self, done: Mask, observations: NDArray[np.float32], info: dict[str, Any]
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Same-step autoreset of the runs in `done`: what they saw last goes to `final_obs` and `final_info`."""
        rows = [int(i) for i in np.flatnonzero(done)]
        final_obs = np.full(self.num_envs, None, dtype=object)
        for row in rows:
            final_obs[row] = observations[row]
        finished = self._data.tasks.take(np.arange(self.num_envs))
        final_info = {**info, "task": {name: getattr(finished, name) for name in finished.__slots__}}
        first, telemetry = self._start(rows)
        observations = np.where(done[:, None], first, observations)
        fresh = self._info({k: np.where(done, telemetry[k], v) for k, v in info["telemetry"].items()})
        return observations, fresh | {
            "final_obs": final_obs,
            "_final_obs": done,
            "final_info": final_info,
            "_final_info": done,
        }
