"""A real Prometheus for the tests: Debian's package, unpacked into a cache and run on loopback without a service."""

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

T = TypeVar("T")


def until(condition: Callable[[], T], what: str, seconds: float = 120.0) -> T:
    """Waits for a condition and returns its value; the limit is for a test that would otherwise hang."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    pytest.fail(f"not within {seconds:g} s: {what}")


def programs(cache: Path) -> dict[str, str]:
    """`prometheus` and `promtool`, from PATH or else from Debian's package; skips where there is neither."""
    names = ("prometheus", "promtool")
    found = {name: shutil.which(name) or str(cache / "usr/bin" / name) for name in names}
    if all(Path(path).exists() for path in found.values()):
        return found
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        pytest.skip("needs prometheus and promtool on PATH, or Debian's apt-get and dpkg")
    fetch = ["apt-get", "download", "prometheus"]
    if _run(fetch, cache).returncode:
        _run(["apt-get", "update"], cache)
        done = _run(fetch, cache)
        if done.returncode:
            pytest.skip(f"needs prometheus: {' '.join(done.stderr.split())[-200:]}")
    (package,) = cache.glob("prometheus_*.deb")
    _run(["dpkg", "-x", str(package), str(cache)], cache).check_returncode()
    package.unlink()
    return found


def _run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Prometheus:
    """A running server's HTTP API."""

    def __init__(self, port: int) -> None:
        self.port = port

    def get(self, path: str, **parameters: str) -> Any:
        """The data of an answer; the server's own words where it refuses."""
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as e:
            pytest.fail(f"{path} {parameters}: {e.read().decode()}")

    def query(self, expr: str) -> list[dict[str, Any]]:
        """The samples of an instant query."""
        data = self.get("query", query=expr)
        assert data["resultType"] == "vector", expr
        return data["result"]

    def value(self, expr: str) -> float:
        """The one sample's value."""
        (sample,) = self.query(expr)
        return float(sample["value"][1])


@contextmanager
def server(program: str, config: Path, data: Path) -> Iterator[Prometheus]:
    """Prometheus under a configuration, with its data in a folder of its own, until the block ends."""
    port = free_port()
    options = [f"--config.file={config}", f"--storage.tsdb.path={data}", f"--web.listen-address=127.0.0.1:{port}"]
    with (data.parent / "prometheus.log").open("w") as log:
        process = subprocess.Popen([program, *options], stdout=log, stderr=log)

        def ready() -> bool:
            assert process.poll() is None, (data.parent / "prometheus.log").read_text()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=5) as answer:
                    return answer.status == 200
            except OSError:
                return False

        try:
            until(ready, "Prometheus is ready")
            yield Prometheus(port)
        finally:
            process.terminate()
            process.wait(60)
