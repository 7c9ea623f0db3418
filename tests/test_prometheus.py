"""The exporter: what a scrape holds, and that nothing about it can hold the run up."""

import math
import re
import subprocess
import sys
import time

import pytest
import torch
from exported_runs import Loop, Scripted, scrape

from lbw_rl import SIGNALS, Action, Authority
from lbw_rl.controllers.entropic import EntroPIC
from lbw_rl.signals import Signal
from lbw_rl.sinks.families import FAMILIES, SIGNAL_FAMILIES, metric_name
from lbw_rl.sinks.prometheus import PrometheusExporter


def test_every_signal_has_a_metric_named_in_base_units():
    names = {name: family.name for name, family in SIGNAL_FAMILIES.items()}
    assert list(names) == list(SIGNALS)
    expected = {
        "step": "lbw_rl_steps_total",
        "progress": "lbw_rl_progress_ratio",
        "learning_rate": "lbw_rl_learning_rate",
        "loss": "lbw_rl_loss_nats",
        "nonfinite": "lbw_rl_nonfinite",
        "grad_norm": "lbw_rl_grad_norm",
        "grad_entropy": "lbw_rl_grad_entropy_ratio",
        "update_ratio": "lbw_rl_update_ratio",
        "collective_seconds": "lbw_rl_collective_seconds",
        "step_seconds": "lbw_rl_step_seconds",
        "tokens_per_second": "lbw_rl_tokens_per_second",
        "gpu_utilization": "lbw_rl_gpu_utilization_ratio",
        "gpu_memory": "lbw_rl_gpu_memory_ratio",
        "gpu_power": "lbw_rl_gpu_power_ratio",
        "gpu_temperature": "lbw_rl_gpu_temperature_celsius",
        "gpu_clock": "lbw_rl_gpu_clock_ratio",
        "gpu_throttled": "lbw_rl_gpu_throttled",
        "host_memory": "lbw_rl_host_memory_ratio",
    }
    assert {name: names[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("unit", "name"), [("bytes", "queue_bytes"), ("bytes/s", "queue_bytes_per_second"), ("s", "queue_seconds")]
)
def test_a_signal_to_come_gets_its_unit_as_a_suffix(unit, name):
    assert metric_name(Signal("queue", unit, 0, math.inf, "clock", "of something")) == f"lbw_rl_{name}"


def test_names_are_unique_valid_and_say_counters_by_total():
    names = [family.name for family in FAMILIES]
    assert len(names) == len(set(names))
    assert all(re.fullmatch(r"lbw_rl_[a-z][a-z0-9_]*[a-z0-9]", name) for name in names)
    assert all(name.endswith("_total") == (family.kind == "counter") for name, family in zip(names, FAMILIES))
    assert all(family.help for family in FAMILIES)
    assert all(SIGNAL_FAMILIES[name].help == signal.definition for name, signal in SIGNALS.items())


def test_a_scrape_holds_the_latest_decision_s_signals_and_nothing_that_was_not_measured(make_mlp):
    exporter = PrometheusExporter(0)
    with Loop(make_mlp(), exporter, total_steps=10) as loop:
        for _ in range(3):
            loop.step()
        found, telemetry = scrape(exporter), loop.governor.last_telemetry.as_dict()
    for name, family in SIGNAL_FAMILIES.items():
        if math.isnan(telemetry[name]):
            assert (family.name,) not in found
        else:
            assert found[(family.name,)] == telemetry[name]
    assert math.isnan(telemetry["gpu_utilization"])
    assert not math.isnan(telemetry["loss"])
    assert found[("lbw_rl_progress_ratio",)] == pytest.approx(0.2)


def test_a_scrape_holds_actions_counts_regimes_evidence_and_the_run(make_mlp):
    action = Action(lr_scale=9.0, momentum_scale=0.9, regime="hot", evidence={"slope": -0.5, "note": "text"})
    exporter = PrometheusExporter(0)
    authority = Authority(lr_scale=(0.1, 1.2))
    with Loop(make_mlp(), exporter, controller=Scripted(action), authority=authority, total_steps=10) as loop:
        loop.step()
        ungrouped = scrape(exporter)
        loop.governor.controller.action = Action(lr_scale=0.5, group_lr_scales=(0.5,), regime="cold")
        loop.step()
        loop.governor.controller.action = action
        loop.step()
        found = scrape(exporter)
        loop.governor.controller.action = Action(lr_scale=0.5, group_lr_scales=(0.5,), regime="cold")
        loop.step()
        grouped = scrape(exporter)
    assert found[("lbw_rl_proposed_lr_scale",)] == 9.0
    assert found[("lbw_rl_executed_lr_scale",)] == 0.75
    assert found[("lbw_rl_executed_momentum_scale",)] == found[("lbw_rl_proposed_momentum_scale",)] == 0.9
    assert found[("lbw_rl_decisions_total",)] == found[("lbw_rl_interventions_total",)] == 3
    assert found[("lbw_rl_skips_total",)] == found[("lbw_rl_rollbacks_total",)] == 0
    assert found[("lbw_rl_overruled_decisions_total",)] == 2
    assert found[("lbw_rl_decisions_by_regime_total", "hot")] == 2
    assert (found[("lbw_rl_regime", "hot")], found[("lbw_rl_regime", "cold")]) == (1, 0)
    assert found[("lbw_rl_evidence", "slope")] == -0.5
    assert ("lbw_rl_evidence", "note") not in found
    assert found[("lbw_rl_mode", "govern")] == 1
    assert sum(value for key, value in found.items() if key[0] == "lbw_rl_mode") == 1
    assert found[("lbw_rl_authority_lr_scale", "high")] == 1.2
    assert (found[("lbw_rl_planned_steps",)], found[("lbw_rl_ranks",)]) == (10, 1)
    assert (found[("lbw_rl_suspended",)], found[("lbw_rl_skip_budget_spent",)]) == (0, 0)
    assert found[("lbw_rl_overhead_seconds_total",)] > 0
    assert abs(found[("lbw_rl_last_decision_timestamp_seconds",)] - time.time()) < 600
    (info,) = [key for key in found if key[0] == "lbw_rl_run_info"]
    assert {"scripted", "AdamW"} <= set(info)
    assert ("lbw_rl_executed_group_lr_scale", "0") not in ungrouped
    assert found[("lbw_rl_executed_group_lr_scale", "0")] == pytest.approx(0.25 * 1.5)  # on its way up, slewed
    assert grouped[("lbw_rl_executed_group_lr_scale", "0")] == 0.25


def test_entropic_s_entropy_and_target_are_exported(make_mlp):
    exporter = PrometheusExporter(0)
    with Loop(make_mlp(), exporter, controller=EntroPIC(warmup=3)) as loop:
        for _ in range(5):
            loop.step()
        found, evidence = scrape(exporter), loop.governor.last_ruling.action.evidence
    assert found[("lbw_rl_evidence", "entropy")] == evidence["entropy"]
    assert found[("lbw_rl_evidence", "target")] == evidence["target"]


def test_before_the_first_decision_a_scrape_tells_of_the_run_alone(make_mlp):
    exporter = PrometheusExporter(0)
    with Loop(make_mlp(), exporter):
        found = scrape(exporter)
    names = {key[0] for key in found}
    assert names == {family.name for family in FAMILIES if family.of_run} - {"lbw_rl_planned_steps"}  # unknown


def test_losses_that_are_not_finite_are_counted_and_leave_the_mean_alone(make_mlp):
    exporter = PrometheusExporter(0)
    with Loop(make_mlp(), exporter) as loop:
        loop.step()
        first = scrape(exporter)
        loop.step(math.nan)
        second = scrape(exporter)
    assert first[("lbw_rl_nonfinite_decisions_total",)] == 0
    assert second[("lbw_rl_nonfinite_decisions_total",)] == second[("lbw_rl_nonfinite",)] == 1
    assert ("lbw_rl_loss_nats",) not in second
    assert second[("lbw_rl_mean_loss_nats",)] == first[("lbw_rl_mean_loss_nats",)] == first[("lbw_rl_loss_nats",)]


def test_the_lowest_mean_stays_when_the_loss_rises(make_mlp):
    exporter = PrometheusExporter(0)
    with Loop(make_mlp(), exporter) as loop:
        for _ in range(4):
            loop.step()
        low = scrape(exporter)[("lbw_rl_lowest_mean_loss_nats",)]
        for _ in range(4):
            loop.step(1000.0)
        found = scrape(exporter)
    assert found[("lbw_rl_lowest_mean_loss_nats",)] <= low < found[("lbw_rl_mean_loss_nats",)]


def test_faults_are_counted_by_source(make_mlp):
    exporter = PrometheusExporter(0)
    with Loop(make_mlp(), exporter, controller=Scripted("nonsense")) as loop:
        for _ in range(6):
            loop.step()
        nonsense = scrape(exporter)
        loop.governor._fault("device", RuntimeError("lost"))
        loop.step()
        found = scrape(exporter)
    assert nonsense[("lbw_rl_suspended",)] == 1
    assert ("lbw_rl_proposed_lr_scale",) not in nonsense
    assert found[("lbw_rl_faults_total", "device")] == 1


def test_no_regime_and_no_evidence_of_a_controller_can_fail_a_scrape(make_mlp):
    odd, lone = 'a "quoted"\\ line\n', "a lone surrogate \ud800"
    exporter = PrometheusExporter(0)
    action = Action(regime=odd, evidence={lone: 1.0, "too large": 10**400, "none": None, "infinite": math.inf})
    with Loop(make_mlp(), exporter, controller=Scripted(action)) as loop:
        loop.step()
        found = scrape(exporter)
    assert found[("lbw_rl_regime", odd)] == 1
    assert [key for key in found if key[0] == "lbw_rl_evidence"] == [("lbw_rl_evidence", "a lone surrogate ?")]


def test_after_governance_is_let_go_scrapes_say_off(make_mlp):
    exporter = PrometheusExporter(0)
    with Loop(make_mlp(), exporter) as loop:
        loop.step()
        loop.governor.set_mode("off")
        loop.step()
        found = scrape(exporter)
    assert (found[("lbw_rl_mode", "off")], found[("lbw_rl_mode", "govern")]) == (1, 0)
    assert found[("lbw_rl_decisions_total",)] == 1


def test_weights_are_the_same_bit_for_bit_with_and_without_an_exporter(make_mlp):
    def weights(*sinks):
        with Loop(make_mlp(), *sinks, controller="lbw-guard") as loop:
            for _ in range(20):
                loop.step()
                for sink in sinks:
                    scrape(sink)
        return list(loop.model.parameters())

    assert all(torch.equal(a, b) for a, b in zip(weights(PrometheusExporter(0)), weights(), strict=True))


@pytest.mark.parametrize(
    ("module", "make"),
    [
        ("prometheus_client", "from lbw_rl.sinks.prometheus import PrometheusExporter as Made; arguments = ()"),
        ("tensorboard", "from lbw_rl.sinks.tensorboard import TensorBoardSink as Made; arguments = ('folder',)"),
    ],
)
def test_a_missing_package_is_named_with_the_extra_that_brings_it(module, make):
    program = f"""
import sys
sys.modules[{module!r}] = None
{make}
try:
    Made(*arguments)
except ModuleNotFoundError as e:
    print(e)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    package = module.replace("_", "-")
    assert done.stdout == f"{package} is not installed; accepted: pip install 'lbw-rl[metrics]'\n"
