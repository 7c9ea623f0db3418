"""The exporter as a server: whatever clients, ports and processes do, the run goes on."""

import logging
import os
import re
import select
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
from exported_runs import Loop, page, scrape
from prometheus_server import free_port, until

from lbw_rl.sinks.prometheus import PrometheusExporter


def test_it_listens_on_loopback_unless_told_otherwise(make_mlp):
    exporter = PrometheusExporter(0)
    with Loop(make_mlp(), exporter):
        assert exporter._server.server_address[0] == "127.0.0.1"


def test_a_port_in_use_costs_the_metrics_and_one_warning_says_why(make_mlp, caplog):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        exporter = PrometheusExporter(port)
        with caplog.at_level(logging.WARNING, "lbw_rl"), Loop(make_mlp(), exporter) as loop:
            for _ in range(3):
                loop.step()
    assert loop.governor.summary()["decisions"] == 3
    assert loop.governor.summary()["faults"] == {"prometheus": 1}
    (message,) = [record.getMessage() for record in caplog.records]
    assert f"there are no metrics, 127.0.0.1:{port} cannot be listened on: Address already in use" in message
    assert "the run goes on" in message


@pytest.mark.parametrize("address", ["192.0.2.1", "no such name", "a..b"])
def test_an_address_that_is_not_this_machine_s_costs_the_metrics_alone(make_mlp, address):
    with Loop(make_mlp(), PrometheusExporter(0, address)) as loop:
        loop.step()
    assert loop.governor.summary()["faults"] == {"prometheus": 1}


@pytest.mark.parametrize("port", [-1, 65536, "9464", 9464.0, True, None])
def test_what_is_no_port_is_refused(port):
    with pytest.raises(ValueError, match=re.escape(f"port: {port!r} is no TCP port; accepted: 1 to 65535, or 0")):
        PrometheusExporter(port)


def test_clients_that_send_nothing_or_read_nothing_hold_no_step_up(make_mlp):
    exporter = PrometheusExporter(0)
    with Loop(make_mlp(), exporter) as loop:
        clients = [socket.create_connection(("127.0.0.1", exporter.port)) for _ in range(20)]
        for client in clients[::2]:
            client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        for _ in range(50):
            loop.step()
        assert scrape(exporter)[("lbw_rl_decisions_total",)] == 50
    assert loop.governor.summary()["decisions"] == 50  # and closing did not wait for them
    assert not loop.governor.summary()["faults"]
    for client in clients:
        client.close()


def test_a_client_that_sends_nothing_is_let_go(make_mlp, monkeypatch):
    monkeypatch.setattr("lbw_rl.sinks.prometheus._CLIENT_SECONDS", 0.05)
    exporter = PrometheusExporter(0)
    with Loop(make_mlp(), exporter), socket.create_connection(("127.0.0.1", exporter.port)) as client:
        client.settimeout(60)
        assert client.recv(1) == b""


def test_a_client_that_goes_away_or_sends_garbage_is_not_worth_a_word(make_mlp, capfd, caplog):
    exporter = PrometheusExporter(0)
    caplog.set_level(logging.DEBUG, "lbw_rl")
    with Loop(make_mlp(), exporter) as loop:
        loop.step()
        for sent in (
            b"",
            b"GET /metrics",
            b"GET /metrics HTTP/1.1\r\n\r\n",
            b"\x00\xff\r\n\r\n",
            b"POST / HTTP/1.1\r\n\r\n",
        ):
            client = socket.create_connection(("127.0.0.1", exporter.port))
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # closes with a reset
            client.sendall(sent)
            client.close()
        assert scrape(exporter)
        told = until(lambda: [r for r in caplog.records if "a scrape failed" in r.getMessage()], "a reset is noticed")
    assert {record.levelno for record in told} == {logging.DEBUG}
    assert capfd.readouterr().err == ""


def test_closing_frees_the_port_and_the_exporter_can_be_opened_again(make_mlp):
    exporter = PrometheusExporter(free_port())
    for _ in range(3):
        with Loop(make_mlp(), exporter) as loop:
            loop.step()
            assert scrape(exporter)[("lbw_rl_decisions_total",)] == 1
        with pytest.raises(urllib.error.URLError):
            page(exporter)
    with socket.create_server(("127.0.0.1", exporter.port)):
        pass


def test_one_exporter_for_two_governors_serves_the_first(make_mlp):
    exporter = PrometheusExporter(0)
    with Loop(make_mlp(), exporter) as first:
        with Loop(make_mlp(), exporter) as second:
            second.step()
        assert second.governor.summary()["faults"] == {"prometheus": 1}
        first.step()
        first.step()
        assert scrape(exporter)[("lbw_rl_decisions_total",)] == 2


def test_forked_workers_neither_keep_the_port_nor_end_it(make_mlp):
    """Data loaders fork: their copies of the listening socket must not outlive it, nor their closing end it."""
    exporter = PrometheusExporter(0)
    loop = Loop(make_mlp(), exporter)
    closed, has_closed = os.pipe()
    children = []
    try:
        for closes in (True, False):
            child = os.fork()
            if child == 0:
                if closes:
                    exporter.close()
                os.write(has_closed, b".")
                signal.pause()
            children.append(child)
        until(lambda: select.select([closed], [], [], 0)[0] and os.read(closed, 1), "a worker is ready")
        until(lambda: select.select([closed], [], [], 0)[0] and os.read(closed, 1), "the other worker is ready")
        loop.step()
        port = exporter.port
        assert scrape(exporter)[("lbw_rl_decisions_total",)] == 1
        loop.governor.close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
        again = PrometheusExporter(port)
        with Loop(make_mlp(), again) as loop:
            loop.step()
            assert scrape(again)[("lbw_rl_decisions_total",)] == 1
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        os.close(closed)
        os.close(has_closed)


ENDING = """
import sys, socket, torch
from lbw_rl import Governor
from lbw_rl.sinks import prometheus
prometheus._CLIENT_SECONDS = 3600.0  # longer than the test would wait
exporter = prometheus.PrometheusExporter(0)
model = torch.nn.Linear(4, 4)
optimizer = torch.optim.AdamW(model.parameters())
governor = Governor(optimizer, "constant", sinks=[exporter])
model(torch.ones(4)).sum().backward()
optimizer.step()
print(exporter.port, flush=True)
sys.stdin.readline()
if "close" in sys.argv:
    governor.close()
if "raise" in sys.argv:
    raise RuntimeError("the run's own")
"""


@pytest.mark.parametrize(("how", "code"), [("close", 0), ("forget", 0), ("raise", 1)])
def test_a_process_ends_although_a_client_keeps_its_connection_open(how, code):
    process = subprocess.Popen(
        [sys.executable, "-c", ENDING, how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    port = int(process.stdout.readline())
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"GET /metrics HTTP/1.1\r\n")  # and no end of the request
        _, said = process.communicate("\n", timeout=120)
    assert process.returncode == code, said
    assert ("the run's own" in said) == (how == "raise")


def test_scrapes_in_parallel_with_steps_are_always_whole(make_mlp):
    """Every scrape is of one decision: regimes sum up to the decisions whenever it comes."""
    import threading

    exporter, wrong, seen = PrometheusExporter(0), [], []
    with Loop(make_mlp(), exporter, controller="lbw-guard") as loop:
        loop.step()
        done = threading.Event()

        def keep_scraping():
            while not done.is_set():
                found = scrape(exporter)
                regimes = sum(v for key, v in found.items() if key[0] == "lbw_rl_decisions_by_regime_total")
                decisions = found[("lbw_rl_decisions_total",)]
                seen.append(decisions)
                if regimes != decisions or found[("lbw_rl_steps_total",)] != decisions - 1:
                    wrong.append(found)

        scraper = threading.Thread(target=keep_scraping)
        scraper.start()
        until(lambda: loop.step() or len(set(seen)) >= 10, "ten scrapes of different decisions")
        done.set()
        scraper.join()
    assert not wrong
