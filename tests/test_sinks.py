"""Sinks: told of every decision, and unable to harm the run."""

import logging
import math
from pathlib import Path

import pytest
import torch

from lbw_rl import Action, Authority, Controller, Directive, Governor
from lbw_rl.sinks import Decision, Sink

STEPS = 8


class Listener(Sink):
    """Keeps all that it is told."""

    name = "listener"

    def __init__(self):
        self.told = []

    def open(self, governor):
        self.told.append(("open", governor))

    def decided(self, decision):
        self.told.append(("decided", decision))

    def close(self):
        self.told.append(("close", None))

    @property
    def decisions(self) -> list[Decision]:
        return [what for kind, what in self.told if kind == "decided"]

    @property
    def calls(self):
        return [kind for kind, _ in self.told]


class Broken(Listener):
    """Raises in one of its hooks."""

    name = "broken"

    def __init__(self, hook):
        super().__init__()
        self.hook = hook

    def _perhaps(self, hook):
        if hook == self.hook:
            raise OSError("no space left on device")

    def open(self, governor):
        super().open(governor)
        self._perhaps("open")

    def decided(self, decision):
        super().decided(decision)
        self._perhaps("decided")

    def close(self):
        super().close()
        self._perhaps("close")


class Scripted(Controller):
    """Proposes what the script says at a step, else a cut to one half."""

    name = "scripted"
    time_limit = None

    def __init__(self, script=None):
        self.script = script or {}

    def reset(self, context):
        pass

    def act(self, telemetry):
        action = self.script.get(int(telemetry.step), Action(lr_scale=0.5, regime="cut", evidence={"seen": 1.0}))
        if isinstance(action, Exception):
            raise action
        return action


def train(make_mlp, steps=STEPS, start=0, **options):
    """A governed run: its weights and its governor, closed."""
    model = make_mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    controller = options.pop("controller", None) or Scripted()
    governor = Governor(optimizer, controller, measure_device=False, **options)
    for step in range(start, start + steps):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        loss = model(x).pow(2).mean()
        loss.backward()
        governor.observe(loss)
        optimizer.step()
        optimizer.zero_grad()
    governor.close()
    return [p.detach().clone() for p in model.parameters()], governor


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_sink_is_opened_told_of_every_decision_and_closed(make_mlp):
    listener = Listener()
    _, governor = train(make_mlp, sinks=[listener])
    assert listener.calls == ["open", *["decided"] * STEPS, "close"]
    assert listener.told[0][1] is governor
    assert [d.step for d in listener.decisions] == list(range(STEPS))
    last = listener.decisions[-1]
    assert last.telemetry == governor.last_telemetry
    assert (last.executed.lr_scale, last.ruled.regime, dict(last.ruled.evidence)) == (0.5, "cut", {"seen": 1.0})
    assert last.counts == {"decisions": STEPS, "interventions": STEPS, "hand_overs": 0}
    assert last.regimes == {"cut": STEPS}
    assert not last.reasons
    assert 0 < last.overhead_seconds <= governor.summary()["overhead_seconds"]


def test_what_a_sink_was_told_does_not_change_afterwards(make_mlp):
    listener = Listener()
    train(make_mlp, sinks=[listener], controller=Scripted({3: RuntimeError("once")}))
    assert [d.counts["decisions"] for d in listener.decisions] == list(range(1, STEPS + 1))
    assert [d.faults.get("controller", 0) for d in listener.decisions] == [0, 0, 0, 1, 1, 1, 1, 1]


def test_a_decision_tells_proposal_ruling_and_why_they_differ(make_mlp):
    script = {1: Action(lr_scale=math.nan), 2: Action(lr_scale=9.0), 3: Action(directive=Directive.SKIP), 4: "nonsense"}
    listener = Listener()
    train(make_mlp, sinks=[listener], controller=Scripted(script), authority=Authority(max_skips=1))
    made = listener.decisions
    assert math.isnan(made[1].proposed.lr_scale)
    assert made[1].executed.lr_scale == 0.75  # 0.5 times the slew limit
    assert (made[2].proposed.lr_scale, made[2].executed.lr_scale) == (9.0, 1.125)
    assert all(d.reasons for d in made[1:3])
    assert made[3].executed.directive is Directive.SKIP
    assert made[3].counts["skips"] == 1
    assert [d.skip_budget_spent for d in made[2:5]] == [False, True, True]
    assert made[4].proposed is None


def test_an_authority_without_skips_has_no_budget_to_spend(make_mlp):
    listener = Listener()
    train(make_mlp, sinks=[listener], authority=Authority(max_skips=0))
    assert not any(d.skip_budget_spent for d in listener.decisions)


def test_shadow_mode_tells_what_would_have_been_done(make_mlp):
    listener = Listener()
    train(make_mlp, sinks=[listener], mode="shadow")
    last = listener.decisions[-1]
    assert (last.ruled.lr_scale, last.executed.lr_scale) == (0.5, 1.0)
    assert last.reasons == ("shadow mode",)


def test_a_suspended_controller_is_told(make_mlp):
    listener = Listener()
    script = {step: RuntimeError("always") for step in range(5)}
    train(make_mlp, sinks=[listener], controller=Scripted(script))
    assert [d.suspended for d in listener.decisions] == [False] * 4 + [True] * 4


@pytest.mark.parametrize("hook", ["open", "decided", "close"])
def test_a_sink_that_raises_is_a_counted_fault_logged_once_and_the_run_is_the_same(make_mlp, hook, caplog):
    broken, listener = Broken(hook), Listener()
    with caplog.at_level(logging.WARNING, "lbw_rl"):
        weights, governor = train(make_mlp, sinks=[broken, listener])
    assert same(weights, train(make_mlp)[0])
    assert governor.summary()["faults"] == {"broken": STEPS if hook == "decided" else 1}
    (message,) = [record.getMessage() for record in caplog.records]
    assert "governance fault in broken" in message
    assert "the run goes on: OSError: no space left on device" in message
    assert listener.calls == ["open", *["decided"] * STEPS, "close"]
    assert broken.calls == (["open"] if hook == "open" else listener.calls)


def test_mode_off_opens_none_and_says_so(make_mlp, caplog):
    listener = Listener()
    with caplog.at_level(logging.WARNING, "lbw_rl"):
        train(make_mlp, sinks=[listener], mode="off")
    assert not listener.told
    assert "mode off measures nothing: listener get nothing" in caplog.text


def test_when_governance_is_let_go_sinks_stay_open_until_the_governor_is_closed(make_mlp):
    model, listener = make_mlp(), Listener()
    optimizer = torch.optim.AdamW(model.parameters())
    governor = Governor(optimizer, "constant", sinks=[listener], measure_device=False)
    for step in range(4):
        if step == 2:
            governor.set_mode("off")
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()
    assert listener.calls == ["open", "decided", "decided"]
    governor.close()
    governor.close()
    assert listener.calls == ["open", "decided", "decided", "close"]


def test_a_checkpoint_of_a_run_that_was_let_go_leaves_sinks_open(make_mlp):
    _, ended = train(make_mlp)
    state = ended.state_dict() | {"mode": "off"}
    listener = Listener()
    governor = Governor(torch.optim.AdamW(make_mlp().parameters()), Scripted(), sinks=[listener], measure_device=False)
    governor.load_state_dict(state)
    assert governor.mode == "off"
    assert listener.calls == ["open"]
    governor.close()
    assert listener.calls == ["open", "close"]


# ---- through the callbacks


def test_trainer_s_callback_hands_sinks_to_its_governor_and_again_at_the_next_training(tmp_path):
    pytest.importorskip("transformers")
    from trainer_runs import STEPS as TRAINED
    from trainer_runs import make_trainer

    from lbw_rl.integrations.huggingface import GovernorCallback

    listener = Listener()
    trainer = make_trainer(tmp_path, GovernorCallback("constant", sinks=[listener]))
    trainer.train()
    assert listener.calls == ["open", *["decided"] * TRAINED, "close"]
    trainer.train()
    assert listener.calls == ["open", *["decided"] * TRAINED, "close"] * 2


def test_trainer_s_callback_with_sinks_can_be_saved_but_not_built_from_json(tmp_path):
    transformers = pytest.importorskip("transformers")
    from trainer_runs import make_trainer

    from lbw_rl.integrations.huggingface import GovernorCallback

    trainer = make_trainer(
        tmp_path, GovernorCallback("constant", sinks=[Listener()]), save_strategy="steps", save_steps=3
    )
    trainer.train()
    saved = transformers.TrainerState.load_from_json(str(tmp_path / "trainer/checkpoint-3/trainer_state.json"))
    assert "sinks" not in saved.stateful_callbacks["GovernorCallback"]["args"]
    with pytest.raises(ValueError, match=r"sinks: .* cannot build listener; accepted: no sinks, or that setting off"):
        make_trainer(
            tmp_path,
            GovernorCallback("constant", sinks=[Listener()]),
            restore_callback_states_from_checkpoint=True,
        )


def test_lightning_s_callback_hands_sinks_to_its_governor(make_mlp, tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")

    from lbw_rl.integrations.lightning import GovernorCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = make_mlp()

        def training_step(self, batch, batch_idx):
            return self.network(batch).pow(2).mean()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())

    listener = Listener()
    trainer = lightning.Trainer(
        max_steps=3,
        callbacks=[GovernorCallback("constant", sinks=[listener])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        default_root_dir=str(tmp_path),
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.randn(12, 8), batch_size=4))
    assert listener.calls == ["open", *["decided"] * 3, "close"]


# ---- through a recipe's run


def test_a_recipe_s_run_keeps_sinks_open_until_its_summary_is_written(tiny, tmp_path):
    pytest.importorskip("transformers")
    from lbw_rl.envs.recipe import load_recipe, override
    from lbw_rl.training_runs.run import run

    class Watchful(Listener):
        def close(self):
            super().close()
            self.finished = (Path(tmp_path) / "out/summary.json").exists()

    watchful = Watchful()
    run(override(load_recipe("mini-qwen2"), tiny), tmp_path / "out", sinks=[watchful])
    assert watchful.calls == ["open", *["decided"] * 6, "close"]
    assert watchful.finished
