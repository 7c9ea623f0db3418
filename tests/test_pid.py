"""The PID law against its analytic answers: dead beat, geometric decay, no wind-up."""

import math

import numpy as np
import pytest
from ratio_plant import RatioPlant

from lbw_rl import Authority, Context, Telemetry
from lbw_rl.controllers.pid import PID
from lbw_rl.setpoint import ratio_level


@pytest.mark.parametrize("gain", [0.1, 1.0, 30.0, 3000.0])
def test_pid_with_integral_gain_one_is_dead_beat_on_the_ratio(gain):
    plant = RatioPlant(PID(setpoint=0.02, kp=0.0, ki=1.0), Authority(lr_scale=(1e-6, 1e6), slew_up=1e12), gain)
    plant.decide()
    assert plant.scale == 1.0  # nothing measured yet: no bump
    assert plant.decide() == pytest.approx(0.02)
    assert plant.decide() == pytest.approx(0.02)


def test_pid_error_decays_geometrically_at_its_integral_gain():
    plant = RatioPlant(PID(setpoint=0.02, kp=0.0, ki=0.3), Authority(lr_scale=(1e-6, 1e6), slew_up=1e12), gain=200.0)
    plant.decide()
    errors = [math.log(0.02 / plant.decide()) for _ in range(10)]
    assert errors[0] == pytest.approx(0.7 * math.log(0.02 / 0.2))
    assert np.diff(np.log(np.abs(errors))) == pytest.approx([math.log(0.7)] * 9)


def test_pid_velocity_form_adds_its_three_terms():
    pid = PID(signal="surprise", setpoint=1.0, kp=0.5, ki=0.25, kd=0.125)
    logs = []
    for surprise in (1.0, math.e, math.e**3):
        action = pid.act(Telemetry(surprise=surprise, learning_rate=1.0, lr_scale=1.0))
        logs.append(math.log(action.lr_scale))
    # errors 0, −1, −3: Kp·(e − e′) + Ki·e + Kd·(e − 2e′ + e″)
    assert logs == pytest.approx([0.0, -0.5 - 0.25 - 0.125, -1.0 - 0.75 - 0.125])


def test_pid_does_not_wind_up_against_a_bound():
    plant = RatioPlant(PID(setpoint=0.02, kp=0.0, ki=0.5), Authority(lr_scale=(0.5, 2.0), slew_up=1e6), gain=1.0)
    for _ in range(100):  # wants 20, may have 2
        plant.decide()
    assert plant.scale == 2.0
    plant.gain = 400.0  # now the ratio is far above the set-point
    plant.decide()
    assert plant.scale < 2.0  # the very next decision comes off the bound


def test_pid_keeps_the_annealing_of_the_user_s_schedule():
    plant = RatioPlant(PID(setpoint=0.02, kp=0.0, ki=1.0), Authority(lr_scale=(1e-6, 1e6), slew_up=1e12), gain=7.0)
    plant.decide()
    plant.decide()
    plant.learning_rate /= 4
    assert plant.decide() == pytest.approx(0.02 / 4)


def test_pid_holds_the_executed_scale_while_there_is_no_signal():
    action = PID().act(Telemetry(learning_rate=1e-3, lr_scale=0.3))
    assert (action.lr_scale, action.regime) == (0.3, "calibrating")


def test_pid_deadband_leaves_small_errors_alone():
    pid = PID(setpoint=0.02, deadband=0.1)
    assert pid.act(Telemetry(update_ratio=0.021, learning_rate=1.0, lr_scale=0.7)).lr_scale == pytest.approx(0.7)


def test_pid_automatic_set_point_is_the_displacement_over_the_root_of_the_horizon():
    pid = PID()
    pid.reset(Context(total_steps=100))
    action = pid.act(Telemetry(update_ratio=0.01, learning_rate=1.0, lr_scale=1.0))
    assert action.evidence["target"] == pytest.approx(ratio_level(100))
