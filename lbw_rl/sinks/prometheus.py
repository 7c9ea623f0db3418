"""Metrics for Prometheus: a scrape reads the latest decision, and the run never waits for one."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from lbw_rl import __version__
from lbw_rl.extras import require
from lbw_rl.recorder import brief
from lbw_rl.sinks.families import FAMILIES, RunFacts, Seen
from lbw_rl.sinks.sink import Decision, Sink
from lbw_rl.statistics import ExponentialMean

if TYPE_CHECKING:
    from lbw_rl.governor import Governor

log = logging.getLogger("lbw_rl")

_CLIENT_SECONDS = 10.0  # a client that neither sends nor reads is let go; a scrape takes milliseconds
_POLL_SECONDS = 0.1  # closing waits that long at most
_HALF_LIFE = 20  # decisions, of the mean loss; `families` says so to the reader


class PrometheusExporter(Sink):
    """Serves the metrics of `lbw_rl.sinks.families` over HTTP, for Prometheus to scrape.

    The training thread stores one reference per decision; the text is made in the scrape's own daemon thread. There is
    no lock between the two, and no client, however slow, holds a step or the end of the process up.

    Args:
        port: TCP port; 0 takes any free one, see `port`.
        address: address to listen on. The default is this machine alone: metrics tell a lot about a run, and nobody is
            asked for a password.

    Raises:
        ValueError: a port outside 0 … 65535.
        ModuleNotFoundError: `prometheus-client` is not installed; it comes with `lbw-rl[metrics]`.
        OSError: from `open`: the port is in use, or the address is not this machine's.
    """

    name = "prometheus"

    def __init__(self, port: int = 9464, address: str = "127.0.0.1") -> None:
        if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port <= 65535:
            raise ValueError(f"port: {port!r} is no TCP port; accepted: 1 to 65535, or 0 for any free one")
        require("prometheus_client")
        self._port, self.address = port, address
        self._server: _Server | None = None
        self._governor: Governor | None = None
        self._seen: Seen | None = None
        self._mean = ExponentialMean(_HALF_LIFE)

    @property
    def port(self) -> int:
        """The port that is listened on; while closed, the one asked for."""
        return self._port if self._server is None else int(self._server.server_address[1])

    def open(self, governor: Governor) -> None:
        """Starts to listen, or says why it cannot."""
        from prometheus_client import CollectorRegistry, MetricsHandler

        if self._server is not None:
            raise RuntimeError("this exporter serves another governor; accepted: one exporter for each")
        registry = CollectorRegistry()
        registry.register(self)
        handler = MetricsHandler.factory(registry)
        handler.timeout = _CLIENT_SECONDS  # type: ignore[attr-defined]
        try:
            server = _Server(self.address, self._port, handler)
        except OSError as e:
            where = f"{self.address}:{self._port}"
            raise OSError(e.errno, f"there are no metrics, {where} cannot be listened on: {e.strerror}") from e
        self._governor, self._seen, self._mean = governor, None, ExponentialMean(_HALF_LIFE)
        self._server = server
        threading.Thread(target=server.serve_forever, args=(_POLL_SECONDS,), name="lbw-rl metrics", daemon=True).start()

    def decided(self, decision: Decision) -> None:
        """Keeps the decision for the scrapes to come."""
        before, loss = self._seen, decision.telemetry.loss
        mean = self._mean.update(loss)
        lowest = mean if before is None else _lower(before.lowest_mean_loss, mean)
        self._seen = Seen(
            decision=decision,
            timestamp=time.time(),
            mean_loss=mean,
            lowest_mean_loss=lowest,
            nonfinite=(before.nonfinite if before else 0) + (decision.telemetry.nonfinite == 1),
            overruled=(before.overruled if before else 0) + (brief(decision.executed) != brief(decision.proposed)),
        )

    def close(self) -> None:
        """Frees the port, whatever its clients are doing."""
        server, self._server = self._server, None
        self._governor = None
        if server is None:
            return
        if server.pid == os.getpid():
            server.shutdown()
            server.server_close()
        else:  # a fork's copy has no thread to wait for, and the listening is not its own to end
            server.socket.close()

    def describe(self) -> list[Any]:
        """Nothing in advance: the registry need not collect in order to know the names."""
        return []

    def collect(self) -> Iterator[Any]:
        """The families that have something to tell, for `prometheus_client`; runs in a scrape's thread."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        governor, seen = self._governor, self._seen
        if governor is None:
            return
        facts = _facts(governor)
        for family in FAMILIES:
            samples = family.samples(facts, seen)
            if not samples:
                continue
            of_kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
            metric = of_kind(family.name, family.help, labels=family.labels)
            for labels, value in samples:
                metric.add_metric(labels, value)
            yield metric


class _Server(ThreadingHTTPServer):
    """One daemon thread per client, none of which is waited for."""

    def __init__(self, address: str, port: int, handler: type) -> None:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family, _, _, _, where = found[0]
        self.pid = os.getpid()
        super().__init__(where[:2], handler)  # type: ignore[arg-type]  # an IPv4 or IPv6 address

    def server_bind(self) -> None:
        """Binds without the look-up of this machine's name, which may hang for as long as a name server does."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def server_close(self) -> None:
        """Ends the listening itself, not only our hold on it: forked data loaders have copies of the socket."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        super().server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is nobody's concern, an error of ours is worth a line."""
        error = sys.exception()
        level = logging.DEBUG if isinstance(error, OSError) else logging.WARNING
        log.log(level, "a scrape failed, the run goes on: %s: %s", type(error).__name__, error)


def _lower(lowest: float, mean: float) -> float:
    return mean if math.isnan(lowest) else min(lowest, mean)


def _facts(governor: Governor) -> RunFacts:
    context = governor.context
    return RunFacts(
        version=__version__,
        controller=governor.controller.name,
        optimizer=type(governor.optimizer).__name__,
        ranks=governor.ranks,
        decide_every=context.decide_every,
        planned_steps=context.total_steps or math.nan,
        lr_scale_range=governor.authority.lr_scale,
        mode=governor.mode,
    )
