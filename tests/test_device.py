"""Device signals: what the machine does not have is missing, and neither an error nor a hang of the driver gets out.

The GPU's part runs through the real NVML binding against a stand-in for the driver's library (`nvml_stand_in.c`),
since no healthy machine shows the failures. The binding loads the library once per process: each scenario is one.
"""

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from lbw_rl import SIGNALS
from lbw_rl.device import DeviceSource, visible_devices

UUIDS = [
    "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6",
    "GPU-8932aaaa-0000-4106-c12f-20bd9faed9f6",
    "GPU-5c6de1f0-0000-4106-c12f-20bd9faed9f6",
]

SCRIPT = """\
value nvmlDeviceGetCount * 3
value nvmlDeviceGetUUID 0 GPU-8932f937-d72c-4106-c12f-20bd9faed9f6
value nvmlDeviceGetUUID 1 GPU-8932aaaa-0000-4106-c12f-20bd9faed9f6
value nvmlDeviceGetUUID 2 GPU-5c6de1f0-0000-4106-c12f-20bd9faed9f6
value nvmlDeviceGetName 0 Stand-in A
value nvmlDeviceGetName 1 Stand-in B
value nvmlDeviceGetName 2 Stand-in C
value nvmlDeviceGetUtilizationRates * 75
value nvmlDeviceGetMemoryInfo * 20000000000 80000000000
value nvmlDeviceGetPowerUsage * 350000
value nvmlDeviceGetEnforcedPowerLimit * 700000
value nvmlDeviceGetTemperature 0 60
value nvmlDeviceGetTemperature 1 61
value nvmlDeviceGetTemperature 2 62
value nvmlDeviceGetClockInfo * 1485
value nvmlDeviceGetMaxClockInfo * 1980
value nvmlDeviceGetCurrentClocksThrottleReasons * 0
"""
"""Three GPUs in good health."""

GPU = {
    "gpu_utilization": 0.75,
    "gpu_memory": 0.25,
    "gpu_power": 0.5,
    "gpu_temperature": 60.0,
    "gpu_clock": 0.75,
    "gpu_throttled": 0.0,
}

PRELUDE = """
import gc, json, logging, os, sys, threading, time, types
from pathlib import Path
from lbw_rl import device
from lbw_rl.device import DeviceSource

SCRIPT = Path(os.environ["NVML_SCRIPT"])
CALLS = Path(os.environ["NVML_CALLS"])
WELL = SCRIPT.read_text()
GPU = json.loads(os.environ["GPU"])
warnings = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: warnings.append(record.getMessage())
logging.getLogger("lbw_rl").addHandler(handler)

def script(*lines):
    # Renamed into place, so that no call reads half a script.
    new = SCRIPT.with_suffix(".new")
    new.write_text(WELL + "".join(line + "\\n" for line in lines))
    new.replace(SCRIPT)

def calls(function):
    return CALLS.read_text().split().count(function) if CALLS.exists() else 0

def until(condition):
    while not condition():
        time.sleep(0.002)

def sample(source):
    # Two samples on: the first may have begun before the caller's last change.
    for _ in range(2):
        old = source.read()
        until(lambda: source.read() and source.read() is not old)
    return source.read()

def gpu(values):
    return {name: value for name, value in values.items() if name.startswith("gpu_")}

def first(**options):
    source = DeviceSource(interval=3600.0, **options)
    assert source.wait(60)
    values = source.read()
    source.close()
    return values
"""


@pytest.fixture
def scenario(nvml_stand_in, tmp_path):
    """Runs a program in a process whose NVML is the stand-in; what it assigns to `result` comes back."""

    def run(body: str, driver: str | Path = "CURRENT_DRIVER", **variables: str):
        (tmp_path / "script").write_text(SCRIPT)
        program = PRELUDE + textwrap.dedent(body) + "\nprint(json.dumps(result))\n"
        folder = nvml_stand_in[driver] if isinstance(driver, str) else driver
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("CUDA_")}
        environment = inherited | {
            "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("LD_LIBRARY_PATH")])),
            "NVML_SCRIPT": str(tmp_path / "script"),
            "NVML_CALLS": str(tmp_path / "calls"),
            "GPU": json.dumps(GPU),
            **variables,
        }
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert not done.stderr, done.stderr  # an exception in a thread is printed, no more
        return json.loads(done.stdout)

    return run


def until(condition):
    while not condition():
        time.sleep(0.002)


# The host


def test_the_host_is_always_measured_within_the_table_s_range():
    source = DeviceSource(interval=0.01)
    until(lambda: {"cpu_utilization", "host_memory"} <= set(source.read()))
    values = source.read()
    assert set(values) <= set(SIGNALS)
    assert all(SIGNALS[k].low <= v <= SIGNALS[k].high for k, v in values.items())
    source.close()


def test_the_first_sample_has_no_cpu_share_rather_than_one_of_0():
    source = DeviceSource(interval=3600.0)
    assert source.wait(60)
    assert "host_memory" in source.read()
    assert "cpu_utilization" not in source.read()
    source.close()


@pytest.mark.parametrize("broken", ["cpu_percent", "virtual_memory"])
def test_a_failure_of_psutil_costs_its_signal_alone(monkeypatch, broken):
    def fails(*_):
        raise OSError("/proc is not mounted")

    signals = {"cpu_percent": "cpu_utilization", "virtual_memory": "host_memory"}
    monkeypatch.setattr(f"lbw_rl.device.psutil.{broken}", fails)
    source = DeviceSource(interval=0.01)
    left = set(signals.values()) - {signals[broken]}
    until(lambda: left <= set(source.read()))
    assert signals[broken] not in source.read()
    source.close()


@pytest.mark.parametrize("interval", [0.0, -1.0, float("nan"), float("inf")])
def test_an_interval_that_is_no_time_is_refused(interval):
    with pytest.raises(ValueError, match=r"interval is .*; accepted: seconds, > 0"):
        DeviceSource(interval=interval)


def test_a_closed_source_closes_again_and_reads_its_last_sample():
    source = DeviceSource(interval=3600.0)
    assert source.wait(60)
    last = source.read()
    source.close()
    source.close()
    assert source.read() is last


# CUDA_VISIBLE_DEVICES


@pytest.mark.parametrize(
    ("setting", "visible"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("0", [0]),
        ("2,0", [2, 0]),
        (" 1 , 2 ", [1, 2]),
        ("0,2,-1,1", [0, 2]),
        ("0,3,1", [0]),
        ("0,,1", [0]),
        ("1gpu2,2ampere", [1, 2]),
        ("1,1", []),
        ("0,GPU-5c6d", [0]),
        (UUIDS[1], [1]),
        (f"{UUIDS[2]},{UUIDS[0]}", [2, 0]),
        ("GPU-5c6de1f0,GPU-8932f", [2, 0]),
        ("GPU-8932", []),
        ("GPU-5c6d,GPU-8932,GPU-8932f", [2]),
        ("GPU-5c6d,GPU-ffff,GPU-8932f", [2]),
        ("GPU-5c6d,GPU-5c6de", []),
        ("GPU-5c6d,0", [2]),
        ("MIG-5c6de1f0-0000-4106-c12f-20bd9faed9f6", []),
        ("MIG-GPU-5c6de1f0-0000-4106-c12f-20bd9faed9f6/1/0", []),
        ("0,MIG-5c6de1f0", [0]),
    ],
)
def test_which_devices_are_visible(monkeypatch, setting, visible):
    """As NVIDIA documents it, and where torch reads the variable too, as torch does."""
    assert visible_devices(setting, UUIDS) == visible
    cuda = pytest.importorskip("torch.cuda")
    if setting is None or setting.startswith("MIG-") or not hasattr(cuda, "_transform_uuid_to_ordinals"):
        return
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
    parsed = cuda._parse_visible_devices()
    if parsed and isinstance(parsed[0], str):
        parsed = cuda._transform_uuid_to_ordinals(parsed, UUIDS)
    outside = [i for i, device in enumerate(parsed) if device >= len(UUIDS)]
    assert visible == parsed[: outside[0] if outside else None]


def test_a_device_of_unknown_uuid_is_visible_by_its_index_alone():
    assert visible_devices("1", ["GPU-a", ""]) == [1]
    assert visible_devices("GPU-a,GPU-b", ["", "GPU-a"]) == [1]


def test_the_ordinal_is_mapped_to_the_physical_device(scenario):
    result = scenario("""
    result = []
    for setting, index in [
        (None, None), (None, 2), (None, 3), (None, -1), ("2,0", 0), ("2,0", 1), ("2,0", 2), ("", 0),
        ("GPU-5c6d,GPU-8932a", 1), ("GPU-8932", 0),
    ]:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        if setting is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = setting
        result.append(first(index=index).get("gpu_temperature"))
    assert not warnings
    """)
    assert result == [60, 62, None, None, 62, 60, None, None, 61, None]


def test_a_mig_instance_has_no_signals_and_one_line_says_so(scenario):
    result = scenario("""
    source = DeviceSource(interval=0.005)
    values = [sample(source) for _ in range(10)][-1]
    result = [gpu(values), len(warnings), "MIG" in warnings[0], calls("nvmlInit"), source.has_gpu]
    source.close()
    """, CUDA_VISIBLE_DEVICES="MIG-GPU-8932f937/1/0")  # fmt: skip
    assert result == [{}, 1, True, 0, False]


def test_a_mig_instance_further_down_the_list_is_no_concern_of_the_devices_before_it(scenario):
    result = scenario("""
    result = [first(index=0)["gpu_temperature"], len(warnings), gpu(first(index=1)), len(warnings)]
    """, CUDA_VISIBLE_DEVICES="GPU-5c6d,MIG-5c6de1f0")  # fmt: skip
    assert result == [62, 0, {}, 1]


def test_devices_that_the_process_may_not_use_are_not_counted_and_lost_ones_are(scenario):
    result = scenario("""
    script("error nvmlDeviceGetHandleByIndex 0 4")  # NO_PERMISSION: a cgroup hides it
    result = [first(index=i).get("gpu_temperature") for i in range(3)]
    script("error nvmlDeviceGetHandleByIndex 0 15")  # GPU_IS_LOST
    result += [first(index=i).get("gpu_temperature") for i in range(3)]
    script("error nvmlDeviceGetUUID 1 999")
    result += [first(index=i).get("gpu_temperature") for i in range(3)]
    assert calls("nvmlInit") == calls("nvmlShutdown") == 9
    """)
    assert result == [61, 62, None, None, 61, 62, 60, None, 62]


def test_where_torch_has_initialised_cuda_its_uuid_decides(scenario):
    result = scenario("""
    uuid = "5c6de1f0-0000-4106-c12f-20bd9faed9f6"
    asked = []
    def properties(index):
        asked.append(index)
        return types.SimpleNamespace(uuid=uuid)
    cuda = types.SimpleNamespace(is_initialized=lambda: True, get_device_properties=properties)
    sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)
    result = [first(index=0)["gpu_temperature"]]
    uuid = "ffffffff-0000-4106-c12f-20bd9faed9f6"  # not a GPU of NVML's: rather none than another
    result.append(gpu(first(index=0)))
    cuda.get_device_properties = lambda index: types.SimpleNamespace()  # torch < 2.5 has no uuid
    result.append(first(index=1)["gpu_temperature"])
    cuda.get_device_properties = properties
    cuda.is_initialized = lambda: False  # asking would initialise it
    result.append(first(index=1)["gpu_temperature"])
    sys.modules["torch"] = types.SimpleNamespace()  # half imported
    result.append(first(index=1)["gpu_temperature"])
    assert asked == [0, 0] and not warnings
    """)
    assert result == [62, {}, 61, 61, 61]


# The GPU


@pytest.mark.parametrize("driver", ["CURRENT_DRIVER", "OLD_DRIVER", "NEW_DRIVER"])
def test_gpu_signals_in_the_table_s_units(scenario, driver):
    result = scenario(
        """
        source = DeviceSource()
        assert source.wait(60)
        result = [gpu(source.read()), source.has_gpu, source.gpus, "torch" in sys.modules]
        source.close()
        source.close()
        assert calls("nvmlInit") == calls("nvmlShutdown") == 1 and not warnings
        """,
        driver,
    )
    assert result == [GPU, True, ["Stand-in A", "Stand-in B", "Stand-in C"], False]
    assert all(SIGNALS[k].low <= v <= SIGNALS[k].high for k, v in GPU.items())


def test_between_two_samples_the_latest_is_repeated_and_each_is_a_new_one(scenario):
    assert scenario("""
    source = DeviceSource(interval=0.2)
    assert source.wait(60)
    before = source.read()
    kept = dict(before)
    script("value nvmlDeviceGetTemperature * 70")
    after = sample(source)
    assert before == kept and before is not after
    assert after["gpu_temperature"] == 70 and source.read() is source.read()
    source.close()
    result = True
    """)


@pytest.mark.parametrize(
    "code", [3, 4, 13, 21], ids=["not supported", "no permission", "function not found", "no data"]
)
def test_a_reading_that_the_gpu_does_not_offer_is_absent_alone(scenario, code):
    functions = {
        "nvmlDeviceGetUtilizationRates": "gpu_utilization",
        "nvmlDeviceGetMemoryInfo": "gpu_memory",
        "nvmlDeviceGetPowerUsage": "gpu_power",
        "nvmlDeviceGetEnforcedPowerLimit": "gpu_power",
        "nvmlDeviceGetTemperature": "gpu_temperature",
        "nvmlDeviceGetClockInfo": "gpu_clock",
        "nvmlDeviceGetMaxClockInfo": "gpu_clock",
        "nvmlDeviceGetCurrentClocksThrottleReasons": "gpu_throttled",
    }
    result = scenario(f"""
    source = DeviceSource(interval=0.005)
    result = {{}}
    for function in {list(functions)}:
        script(f"error {{function}} * {code}")
        result[function] = sorted(set(GPU) - set(sample(source)))
        assert source.has_gpu
    script()
    assert gpu(sample(source)) == GPU
    source.close()
    assert not warnings and calls("nvmlInit") == 1
    """)
    assert result == {function: [signal] for function, signal in functions.items()}


def test_an_impossible_answer_is_absent(scenario):
    result = scenario("""
    source = DeviceSource(interval=0.005)
    result = []
    for line in (
        "value nvmlDeviceGetEnforcedPowerLimit * 0",
        "value nvmlDeviceGetMaxClockInfo * 0",
        "value nvmlDeviceGetMemoryInfo * 0 0",
        "value nvmlDeviceGetUtilizationRates * 4294967295",
        "value nvmlDeviceGetTemperature * 4294967295",
    ):
        script(line)
        result += set(GPU) - set(sample(source))
    assert not warnings
    source.close()
    """)
    # The last is −1 °C by the newer call, which is signed: a value.
    assert result == ["gpu_power", "gpu_clock", "gpu_memory", "gpu_utilization"]


def test_throttled_is_held_down_for_heat_or_power_and_for_nothing_else(scenario):
    result = scenario("""
    import pynvml
    source = DeviceSource(interval=0.005)
    result = {}
    prefix = "nvmlClocksEventReason"
    for name in dir(pynvml):
        if name.startswith(prefix) and name != prefix + "All":
            script(f"value nvmlDeviceGetCurrentClocksThrottleReasons * {getattr(pynvml, name) | 1}")
            result[name.removeprefix(prefix)] = sample(source)["gpu_throttled"]
    source.close()
    """)
    held_down = {"SwPowerCap", "HwSlowdown", "SwThermalSlowdown", "HwThermalSlowdown", "HwPowerBrakeSlowdown"}
    assert {name for name, value in result.items() if value == 1.0} == held_down
    assert {"None", "GpuIdle", "ApplicationsClocksSetting", "SyncBoost"} <= set(result)
    assert set(result.values()) == {0.0, 1.0}


# A driver that fails


@pytest.mark.parametrize("missing", ["driver", "library"])
def test_without_a_driver_the_gpu_signals_are_absent_and_nobody_is_warned(scenario, tmp_path, missing):
    driver: str | Path = "CURRENT_DRIVER"
    if missing == "library":
        (tmp_path / "libnvidia-ml.so.1").write_bytes(b"no library")
        driver = tmp_path
    result = scenario(
        """
        SCRIPT.unlink()
        source = DeviceSource(interval=0.005)
        for _ in range(20):
            values = sample(source)
        result = [gpu(values), "host_memory" in values, source.has_gpu, source.gpus, warnings, calls("nvmlInit")]
        source.close()
        """,
        driver,
    )
    assert result == [{}, True, False, [], [], 1 if missing == "driver" else 0]


@pytest.mark.parametrize(
    "failure",
    [
        'script("error nvmlDeviceGetUtilizationRates * 15")',  # GPU_IS_LOST
        'script("error nvmlDeviceGetTemperature * 15")',
        'script("error nvmlDeviceGetCurrentClocksThrottleReasons * 16")',  # RESET_REQUIRED
        'script("error * * 1")',  # UNINITIALIZED
        'script("error * * 999")',  # UNKNOWN
        'script("error * * 31")',  # a code that the binding has no name for
        "SCRIPT.unlink()",  # the driver is unloaded
    ],
)
def test_a_gpu_lost_in_mid_run_goes_missing_with_one_warning_until_it_is_back(scenario, failure):
    result = scenario(f"""
    source = DeviceSource(interval=0.005)
    assert gpu(sample(source)) == GPU
    {failure}
    until(lambda: not source.has_gpu)
    tried = calls("nvmlInit")
    for _ in range(20):
        values = sample(source)
    assert not gpu(values) and {{"host_memory"}} <= set(values)
    assert tried == calls("nvmlInit") == 1
    device.RETRY_SECONDS = 0.0  # from the next loss on
    source.close()
    assert len(warnings) == 1

    script()
    source = DeviceSource(interval=0.005)
    until(lambda: source.has_gpu)
    {failure}
    until(lambda: not source.has_gpu)
    tried = calls("nvmlInit")
    until(lambda: calls("nvmlInit") > tried + 3)
    script()
    until(lambda: source.has_gpu)
    assert gpu(sample(source)) == GPU
    assert len(warnings) == 2
    {failure}  # a second loss is news again
    until(lambda: not source.has_gpu)
    source.close()
    result = warnings
    """)
    assert len(result) == 3
    assert all(line.startswith("the GPU's signals are gone until the driver answers again: ") for line in result)


@pytest.mark.parametrize("function", ["nvmlDeviceGetCount", "nvmlDeviceGetTemperature"])
def test_a_driver_that_answers_to_initialisation_and_then_fails_is_let_go_each_time(scenario, function):
    assert scenario(f"""
    device.RETRY_SECONDS = 0.0
    script("error {function} * 15")
    source = DeviceSource(interval=0.002)
    until(lambda: calls("nvmlInit") > 5)
    source.close()
    assert calls("nvmlInit") == calls("nvmlShutdown")
    result = True
    """)


@pytest.mark.parametrize("function", ["nvmlInit", "nvmlDeviceGetCount", "nvmlDeviceGetMemoryInfo"])
@pytest.mark.parametrize("closes", [True, False])
def test_a_driver_that_hangs_from_the_start_holds_nobody_up(scenario, function, closes):
    """The scenario ends within its limit only if no call waits for the driver's hour."""
    assert scenario(f"""
    script("delay {function} * 3600")
    source = DeviceSource(interval=0.005)
    until(lambda: calls("{function}"))
    assert [source.read() for _ in range(1000)] == [{{}}] * 1000
    assert not source.has_gpu and not source.wait(0.05)
    if {closes}:
        source.close()
        source.close()
        assert source.read() == {{}}
    result = True
    """)


def test_a_driver_that_hangs_in_mid_run_holds_nobody_up_and_its_last_sample_expires(scenario):
    assert scenario("""
    device._STALE_SECONDS = 2.0
    source = DeviceSource(interval=0.005)
    assert gpu(sample(source)) == GPU
    script("delay nvmlDeviceGetPowerUsage * 3600")
    until(lambda: source.read() == {})
    source.close()
    result = True
    """)


# The thread


def test_a_thousand_sources_leave_no_thread_and_no_hold_on_the_driver(scenario):
    assert scenario("""
    before = len(os.listdir("/proc/self/task"))  # some are numpy's
    for _ in range(1000):
        DeviceSource().close()
    assert threading.active_count() == 1
    until(lambda: len(os.listdir("/proc/self/task")) == before)  # joined is a little before gone
    assert calls("nvmlInit") == calls("nvmlShutdown") == 1000
    result = True
    """)


def test_a_source_that_is_forgotten_stops(scenario):
    assert scenario("""
    source = DeviceSource(interval=3600.0)
    assert source.wait(60) and threading.active_count() == 2
    del source
    gc.collect()
    until(lambda: threading.active_count() == 1)
    assert calls("nvmlShutdown") == 1
    result = True
    """)


def test_a_source_left_open_does_not_keep_the_process_alive(scenario):
    assert scenario("source = DeviceSource(interval=3600.0)\nresult = source.wait(60)")


def test_a_fork_s_copy_neither_hangs_nor_samples(scenario):
    assert scenario("""
    import warnings as w
    w.simplefilter("ignore", DeprecationWarning)
    source = DeviceSource(interval=0.001)
    assert source.wait(60)
    for _ in range(50):
        child = os.fork()
        if child == 0:
            source.read()
            source.close()
            source.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    assert gpu(sample(source)) == GPU
    source.close()
    result = True
    """)


# The doctor


def test_the_doctor_names_the_visible_gpus_and_does_not_wait_for_a_driver_that_hangs(scenario):
    result = scenario("""
    from lbw_rl import doctor
    def nvml():
        return doctor.examine()["nvml"]
    result = [nvml()]
    SCRIPT.unlink()
    result.append(nvml())
    script("delay nvmlInit * 3600")
    doctor._DRIVER_SECONDS = 0.1
    result.append(nvml())
    """, CUDA_VISIBLE_DEVICES="2,0")  # fmt: skip
    missing = "GPU signals are missing (NaN)"
    assert result == [
        "Stand-in C, Stand-in A",
        f"no NVIDIA driver or no visible GPU: {missing}",
        f"no answer in 0.1 s: {missing}",
    ]
