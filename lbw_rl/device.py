"""What the hardware says: NVML where there is an NVIDIA GPU, psutil for the host."""

from __future__ import annotations

import contextlib
import time

import psutil


class DeviceSource:
    """Samples utilisation, memory, power and temperature, at most once every `interval` seconds.

    What a machine does not have is absent from `read`'s answer, never 0. No error of the driver reaches the
    caller: a source that fails once (driver gone, GPU lost) is closed and its signals go missing.
    """

    def __init__(self, index: int = 0, interval: float = 1.0) -> None:
        self.interval = interval
        self._next = 0.0
        self._latest: dict[str, float] = {}
        self._nvml, self._handle = _open_nvml(index)
        psutil.cpu_percent()  # the first call only starts the clock

    @property
    def has_gpu(self) -> bool:
        """Whether NVML answers."""
        return self._handle is not None

    def read(self) -> dict[str, float]:
        """signal name → value, the latest sample."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + self.interval
            self._latest = {
                "cpu_utilization": psutil.cpu_percent() / 100,
                "host_memory": psutil.virtual_memory().percent / 100,
            }
            self._latest.update(self._read_gpu())
        return self._latest

    def _read_gpu(self) -> dict[str, float]:
        nvml, handle = self._nvml, self._handle
        if nvml is None or handle is None:
            return {}
        readings = {
            "gpu_utilization": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
            "gpu_memory": lambda: (lambda m: m.used / m.total)(nvml.nvmlDeviceGetMemoryInfo(handle)),
            "gpu_power": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / nvml.nvmlDeviceGetEnforcedPowerLimit(handle),
            "gpu_temperature": lambda: float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
        }
        values = {}
        for name, reading in readings.items():
            try:
                values[name] = reading()
            except nvml.NVMLError_NotSupported:
                continue
            except nvml.NVMLError:
                self.close()
                break
        return values

    def close(self) -> None:
        """Lets go of NVML."""
        if self._nvml is not None and self._handle is not None:
            with contextlib.suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()
        self._handle = None


def _open_nvml(index: int):  # type: ignore[no-untyped-def]
    import pynvml

    try:
        pynvml.nvmlInit()
        return pynvml, pynvml.nvmlDeviceGetHandleByIndex(index)
    except pynvml.NVMLError:
        return pynvml, None
