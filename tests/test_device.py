"""Device signals: what the machine does not have is missing, and no driver error reaches the caller."""

import sys
import types

import pytest

from lbw_rl import SIGNALS
from lbw_rl.device import DeviceSource

GPU = {"gpu_utilization", "gpu_memory", "gpu_power", "gpu_temperature"}


def scripted_nvml():
    """A stand-in for the driver alone, whose failures no healthy machine can show: set `nvml.fails` to make it fail."""

    class NVMLError(Exception):
        pass

    class NVMLErrorNotSupported(NVMLError):
        pass

    nvml = types.SimpleNamespace(
        NVMLError=NVMLError, NVMLError_NotSupported=NVMLErrorNotSupported, NVML_TEMPERATURE_GPU=0, fails={}, open=0
    )

    def answering(name, value):
        def call(*_):
            if name in nvml.fails:
                raise nvml.fails[name]
            return value

        return call

    def count(change):
        nvml.open += change

    nvml.nvmlInit = lambda: count(+1)
    nvml.nvmlShutdown = lambda: count(-1)
    nvml.nvmlDeviceGetHandleByIndex = answering("handle", object())
    nvml.nvmlDeviceGetUtilizationRates = answering("utilization", types.SimpleNamespace(gpu=75))
    nvml.nvmlDeviceGetMemoryInfo = answering("memory", types.SimpleNamespace(used=20, total=80))
    nvml.nvmlDeviceGetPowerUsage = answering("power", 350_000)
    nvml.nvmlDeviceGetEnforcedPowerLimit = answering("limit", 700_000)
    nvml.nvmlDeviceGetTemperature = answering("temperature", 61)
    return nvml


@pytest.fixture
def nvml(monkeypatch):
    module = scripted_nvml()
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module


def test_the_host_is_always_measured_within_the_table_s_range():
    values = DeviceSource().read()
    assert {"cpu_utilization", "host_memory"} <= set(values) <= set(SIGNALS)
    assert all(SIGNALS[k].low <= v <= SIGNALS[k].high for k, v in values.items())


def test_without_a_gpu_its_signals_are_absent(nvml):
    nvml.nvmlInit = None
    nvml.nvmlDeviceGetHandleByIndex = None

    def no_driver():
        raise nvml.NVMLError("driver not loaded")

    nvml.nvmlInit = no_driver
    source = DeviceSource()
    assert not source.has_gpu
    assert not GPU & set(source.read())
    source.close()


def test_gpu_signals_in_the_table_s_units(nvml):
    source = DeviceSource()
    values = source.read()
    assert {k: values[k] for k in GPU} == {
        "gpu_utilization": 0.75,
        "gpu_memory": 0.25,
        "gpu_power": 0.5,
        "gpu_temperature": 61.0,
    }
    source.close()
    source.close()
    assert nvml.open == 0


def test_a_reading_that_the_gpu_does_not_offer_is_absent_alone(nvml):
    nvml.fails["power"] = nvml.NVMLError_NotSupported("no power sensor")
    source = DeviceSource()
    values = source.read()
    assert GPU - set(values) == {"gpu_power"}
    assert source.has_gpu


@pytest.mark.parametrize("lost", ["utilization", "memory", "temperature"])
def test_a_gpu_lost_in_mid_run_goes_missing_for_good(nvml, lost):
    source = DeviceSource(interval=0.0)
    assert set(source.read()) >= GPU
    nvml.fails[lost] = nvml.NVMLError("GPU is lost")
    source.read()
    assert not source.has_gpu
    assert set(source.read()) == {"cpu_utilization", "host_memory"}
    assert nvml.open == 0


def test_between_two_samples_the_latest_is_repeated(nvml):
    source = DeviceSource(interval=3600.0)
    first = source.read()
    nvml.fails["utilization"] = nvml.NVMLError("not asked")
    assert source.read() is first
