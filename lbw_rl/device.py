"""What the hardware says: NVML where there is an NVIDIA GPU, psutil for the host."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import queue
import re
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import psutil

from lbw_rl.signals import SIGNALS

log = logging.getLogger("lbw_rl")

RETRY_SECONDS = 60.0
"""From one attempt to reach the driver to the next: initialising a driver that is gone is slow, and spoils its log."""
_STALE_SECONDS = 10.0  # beyond two intervals: a sample that old says nothing of now
_CLOSE_SECONDS = 1.0
_CPU_SECONDS = 0.1  # the kernel counts CPU time in ticks of 10 ms: the share of a shorter time is noise

# NVML's clocks event reasons: SW power cap, HW slowdown, SW and HW thermal slowdown, HW power brake. Bits of the
# driver's interface: the bindings' names for them change between versions.
_THROTTLED = 0x04 | 0x08 | 0x20 | 0x40 | 0x80


def visible_devices(setting: str | None, uuids: Sequence[str]) -> list[int]:
    """The physical device behind each CUDA ordinal, as the CUDA runtime reads the variable CUDA_VISIBLE_DEVICES.

    The first entry decides whether the entries are physical indices or UUIDs; the first invalid one (-1, an index
    or a UUID of no device, a prefix of two UUIDs) ends the list; a device named twice makes it empty. MIG instances
    are no devices here.

    Args:
        setting: the variable's value; `None` if it is unset, which leaves every device visible.
        uuids: UUIDs of the physical devices in their order ("GPU-8932f937-…"), "" where unknown.

    Returns:
        Indices into `uuids`; the position is the CUDA ordinal.
    """
    if setting is None:
        return list(range(len(uuids)))
    visible: list[int] = []
    for entry in setting.split(","):
        if setting.startswith("GPU-"):
            named = [i for i, uuid in enumerate(uuids) if entry.startswith("GPU-") and uuid.startswith(entry)]
        else:
            number = re.match(r"[+-]?[0-9]+", entry.strip())  # as C's strtol: "1gpu" is 1
            named = [int(number[0])] if number and 0 <= int(number[0]) < len(uuids) else []
        if len(named) != 1:
            break
        if named[0] in visible:
            return []
        visible += named
    return visible


class DeviceSource:
    """Samples the GPU's and the host's state in a thread of its own.

    What a machine does not have is absent from `read`'s answer, never 0, and so is what the driver does not offer
    for this GPU. A GPU that is lost or a driver that is gone takes the GPU's signals away, with one logged warning;
    they come back if the driver does, within `RETRY_SECONDS`. No error of the driver or of psutil reaches the caller,
    and no call of the driver that hangs holds the caller up: the thread waits alone.

    A source that is neither closed nor referred to any more stops by itself; its thread never keeps the process alive.
    After a fork, the child's copy samples no more.

    Args:
        index: CUDA ordinal of the GPU, that of torch's `cuda:index`; `None` is 0. CUDA_VISIBLE_DEVICES maps it to the
            physical device. If torch has initialised CUDA by now, its UUID of the device decides; if not, CUDA is
            assumed to order the devices as NVML does, which it does for certain with CUDA_DEVICE_ORDER=PCI_BUS_ID.
        interval: seconds between two samples, > 0.

    Raises:
        ValueError: `interval` is out of range.
    """

    def __init__(self, index: int | None = None, interval: float = 1.0) -> None:
        if not 0 < interval <= threading.TIMEOUT_MAX:
            raise ValueError(f"interval is {interval!r}; accepted: seconds, > 0")
        ordinal = index or 0
        setting = os.environ.get("CUDA_VISIBLE_DEVICES")
        # The entries up to the ordinal: a MIG instance ends the list of devices as any entry that names none does.
        mig = any(entry.strip().startswith("MIG-") for entry in (setting or "").split(",")[: ordinal + 1])
        if mig:
            log.warning("CUDA_VISIBLE_DEVICES names a MIG instance, NVML measures whole GPUs: no GPU signals")
        uuid = _uuid_in_torch(ordinal)
        self._stale = _STALE_SECONDS + 2 * interval
        self._sampler = _Sampler(interval, None if mig else lambda: _Gpu(ordinal, setting, uuid))
        self._thread = threading.Thread(target=self._sampler.run, name="lbw-rl-device", daemon=True)
        self._thread.start()
        self._stop = weakref.finalize(self, self._sampler.stop.put, None)
        self._stop.atexit = False  # the process does not wait for the thread, and need not wake it

    @property
    def has_gpu(self) -> bool:
        """Whether NVML answered for the GPU at the latest sample."""
        return bool(self._sampler.gpus)

    @property
    def gpus(self) -> tuple[str, ...]:
        """Names of the GPUs that CUDA_VISIBLE_DEVICES leaves visible, in its order; empty without `has_gpu`."""
        return self._sampler.gpus

    def wait(self, timeout: float) -> bool:
        """Waits for the first sample, at most `timeout` seconds; whether there is one."""
        return self._sampler.sampled.wait(timeout)

    def read(self) -> dict[str, float]:
        """Signal name → value of the latest sample; empty before the first, and while sampling is held up.

        Never blocks. Each sample is a new dict; the thread does not touch it again.
        """
        taken, values = self._sampler.latest
        return values if time.monotonic() - taken < self._stale else {}

    def close(self) -> None:
        """Stops sampling and lets go of NVML. A thread that the driver holds is left behind after a second."""
        if self._stop.alive:
            self._stop()
            self._thread.join(_CLOSE_SECONDS)


class _Sampler:
    """What the thread works on. It does not know its source, so that a forgotten source is collected, and stops it."""

    def __init__(self, interval: float, open_gpu: Callable[[], _Gpu] | None) -> None:
        self.interval = interval
        self.open_gpu = open_gpu
        # Not an Event: its lock, held by the thread while the process forks, would hang a close in the child.
        self.stop: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.sampled = threading.Event()
        self.latest: tuple[float, dict[str, float]] = (-math.inf, {})
        self.gpus: tuple[str, ...] = ()

    def run(self) -> None:
        host = _Host()
        gpu: _Gpu | None = None
        retry = -math.inf
        warned = stopped = False
        while not stopped:
            values = host.read()
            try:
                if gpu is None and self.open_gpu is not None and time.monotonic() >= retry:
                    gpu = self.open_gpu()
                if gpu is not None:
                    values.update(gpu.read())
                    warned = False
            except Exception as error:
                retry = time.monotonic() + RETRY_SECONDS
                if gpu is None:  # no driver, no such device: most machines, and no reason to warn
                    log.debug("no GPU signals: %s", error)
                else:
                    if not warned:
                        log.warning("the GPU's signals are gone until the driver answers again: %s", error)
                    warned = True
                    gpu.close()
                    gpu = None
            self.gpus = () if gpu is None else gpu.names
            self.latest = (time.monotonic(), values)
            self.sampled.set()
            with contextlib.suppress(queue.Empty):
                self.stop.get(timeout=self.interval)
                stopped = True
        if gpu is not None:
            gpu.close()


class _Host:
    """The host's share of CPU time and memory in use."""

    def __init__(self) -> None:
        self._cpu: dict[str, float] = {}
        with contextlib.suppress(Exception):
            psutil.cpu_percent()  # psutil measures from call to call, thread by thread: this starts the clock
        self._since = time.monotonic()

    def read(self) -> dict[str, float]:
        with contextlib.suppress(Exception):
            if time.monotonic() - self._since >= _CPU_SECONDS:
                self._cpu = {}
                self._since = time.monotonic()
                self._cpu = {"cpu_utilization": psutil.cpu_percent() / 100}
        memory = {}
        with contextlib.suppress(Exception):
            memory["host_memory"] = psutil.virtual_memory().percent / 100
        return {**self._cpu, **memory}


class _Gpu:
    """One GPU behind NVML, for the sampling thread alone: any of these calls may hang.

    Raises:
        LookupError: the device is not visible.
        Exception: whatever else NVML or its binding is unhappy with.
    """

    def __init__(self, ordinal: int, setting: str | None, uuid: str | None) -> None:
        import pynvml  # thousands of lines, which a process without governance need not read

        self._nvml: Any = pynvml
        pynvml.nvmlInit()
        try:
            handles, uuids = self._devices()
            visible = visible_devices(setting, uuids)
            if uuid is not None:
                self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            elif 0 <= ordinal < len(visible) and handles[visible[ordinal]] is not None:
                self._handle = handles[visible[ordinal]]
            else:
                raise LookupError(f"cuda:{ordinal} is not among the {len(visible)} visible GPUs")
            self.names = tuple(self._name(handles[i]) for i in visible) or (self._name(self._handle),)
        except BaseException:
            self.close()
            raise
        self._not_offered = {
            pynvml.NVML_ERROR_NOT_SUPPORTED,
            pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
            pynvml.NVML_ERROR_NO_PERMISSION,
            pynvml.NVML_ERROR_NO_DATA,
        }
        self._readings: dict[str, Callable[[], float]] = {
            "gpu_utilization": lambda: pynvml.nvmlDeviceGetUtilizationRates(self._handle).gpu / 100,
            "gpu_memory": self._memory,
            "gpu_power": self._power,
            "gpu_temperature": self._temperature,
            "gpu_clock": self._clock,
            "gpu_throttled": self._throttled,
        }

    def read(self) -> dict[str, float]:
        """Signal name → value.

        Raises:
            NVMLError: the GPU or the driver is gone.
        """
        values = {}
        for name, reading in self._readings.items():
            try:
                value = float(reading())
            except self._nvml.NVMLError as error:
                if error.value not in self._not_offered:
                    raise
            except (ArithmeticError, AttributeError):  # a maximum of 0; a binding older than the function
                continue
            else:
                # NVML has numbers that stand for "not available", such as 2³² − 1
                if SIGNALS[name].low <= value <= SIGNALS[name].high:
                    values[name] = value
        return values

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._nvml.nvmlShutdown()

    def _devices(self) -> tuple[list[Any], list[str]]:
        """Handle and UUID of every device that the process may use; `None` and "" for one that does not answer."""
        nvml = self._nvml
        handles: list[Any] = []
        uuids: list[str] = []
        for i in range(nvml.nvmlDeviceGetCount()):
            try:
                handle = nvml.nvmlDeviceGetHandleByIndex(i)
                uuid = nvml.nvmlDeviceGetUUID(handle)
            except nvml.NVMLError_NoPermission:  # NVML counts the devices that a cgroup hides; CUDA does not
                continue
            except nvml.NVMLError:  # CUDA counted it when it was well: the others keep their places
                handle, uuid = None, ""
            handles.append(handle)
            uuids.append(uuid)
        return handles, uuids

    def _name(self, handle: Any) -> str:
        if handle is not None:
            with contextlib.suppress(Exception):
                return str(self._nvml.nvmlDeviceGetName(handle))
        return "unnamed GPU"

    def _memory(self) -> float:
        memory = self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
        return memory.used / memory.total

    def _power(self) -> float:
        nvml = self._nvml
        return nvml.nvmlDeviceGetPowerUsage(self._handle) / nvml.nvmlDeviceGetEnforcedPowerLimit(self._handle)

    def _temperature(self) -> float:
        names = ("nvmlDeviceGetTemperatureV", "nvmlDeviceGetTemperature")
        return self._newest(names, self._nvml.NVML_TEMPERATURE_GPU)

    def _clock(self) -> float:
        nvml = self._nvml
        clock = nvml.nvmlDeviceGetClockInfo(self._handle, nvml.NVML_CLOCK_SM)
        return clock / nvml.nvmlDeviceGetMaxClockInfo(self._handle, nvml.NVML_CLOCK_SM)

    def _throttled(self) -> float:
        names = ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")
        return float(self._newest(names) & _THROTTLED != 0)

    def _newest(self, names: Sequence[str], *arguments: Any) -> Any:
        """Calls the first of `names`, newest first, that both the binding and the driver have."""
        for name in names:
            call = getattr(self._nvml, name, None)
            if call is not None:
                with contextlib.suppress(self._nvml.NVMLError_FunctionNotFound):
                    return call(self._handle, *arguments)
        raise self._nvml.NVMLError(self._nvml.NVML_ERROR_FUNCTION_NOT_FOUND)


def _uuid_in_torch(ordinal: int) -> str | None:
    """NVML's UUID of `cuda:ordinal`, if torch has initialised CUDA; asking must not be what initialises it."""
    torch = sys.modules.get("torch")
    try:
        if torch is None or not torch.cuda.is_initialized():
            return None
        uuid = str(torch.cuda.get_device_properties(ordinal).uuid)
    except Exception:
        return None
    return uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
