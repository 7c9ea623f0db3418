"""One decision's signals at a time, for tests that look at what is measured rather than at what is decided."""

import math

import numpy as np

from lbw_rl.measurement import Measurement
from lbw_rl.probe import Probe
from lbw_rl.sample import SAMPLE_SIZE


class Signals(dict):
    """Signal name → value; what was not measured is absent and reads NaN."""

    def __missing__(self, name):
        return math.nan


class Measuring:
    """A `Measurement` without clock and device; a fault in it fails the test."""

    def __init__(self, optimizer, sample=SAMPLE_SIZE):
        def fail(where, error):
            raise error

        self.measurement = Measurement(optimizer, None, fail, clock_and_device=False)
        self.probe = self.measurement.probe = Probe(optimizer, sample)
        self.before_step, self.after_step = self.probe.before_step, self.probe.after_step
        self.state_dict, self.load_state_dict = self.probe.state_dict, self.probe.load_state_dict

    def measure(self, loss=None, grad_norm=None):
        if loss is not None:
            self.measurement.observer.loss(loss)
        if grad_norm is not None:
            self.measurement.observer.grad_norm(grad_norm)
        telemetry = self.measurement.take({}, np.zeros(0, np.float32), 0).telemetry
        return Signals({name: value for name, value in telemetry.as_dict().items() if not math.isnan(value)})
