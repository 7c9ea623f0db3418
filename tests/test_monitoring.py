"""Prometheus and Grafana files against the real thing: Debian's Prometheus scrapes governed runs."""

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("prometheus_client", reason="needs the extra lbw-rl[metrics]")

from prometheus_server import free_port, programs, server, until

from lbw_rl import SIGNALS
from lbw_rl.sinks.families import FAMILIES, SIGNAL_FAMILIES
from lbw_rl.training_runs.monitoring.dashboard import FILE, dashboard, text

FOLDER = FILE.parents[2]
WORKER = Path(__file__).with_name("monitored_worker.py")

GPU = """\
value nvmlDeviceGetCount * 1
value nvmlDeviceGetUUID 0 GPU-8932f937-d72c-4106-c12f-20bd9faed9f6
value nvmlDeviceGetName 0 Stand-in
value nvmlDeviceGetUtilizationRates * 75
value nvmlDeviceGetMemoryInfo * 20000000000 80000000000
value nvmlDeviceGetPowerUsage * 350000
value nvmlDeviceGetEnforcedPowerLimit * 700000
value nvmlDeviceGetTemperature * 60
value nvmlDeviceGetClockInfo * 1485
value nvmlDeviceGetMaxClockInfo * 1980
value nvmlDeviceGetCurrentClocksThrottleReasons * 0
"""


def panels():
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


EXPRESSIONS = [(panel["title"], target["expr"]) for panel in panels() for target in panel["targets"]]


def alerts():
    """Name → expression, read from the file without a YAML library: one line each."""
    return re.findall(r"- alert: (\w+)\n +expr: (.+)", (FOLDER / "alerts.yml").read_text(encoding="utf-8"))


# ---- what is in the files


def test_the_dashboard_is_the_generated_one():
    """The file is what `python -m lbw_rl.training_runs.monitoring.dashboard` writes."""
    assert FILE.read_text(encoding="utf-8") == text()


def test_every_signal_is_on_the_dashboard():
    shown = " ".join(expr for _, expr in EXPRESSIONS)
    twice = {"lr_scale", "momentum_scale"}  # of the step before; shown are the latest decision's
    missing = [name for name in SIGNALS if name not in twice and f"{SIGNAL_FAMILIES[name].name}{{" not in shown]
    assert not missing


def test_the_dashboard_and_the_alerts_name_only_metrics_that_exist():
    known = {family.name for family in FAMILIES}
    text_of_all = " ".join([*(expr for _, expr in EXPRESSIONS), *(expr for _, expr in alerts())])
    assert set(re.findall(r"\blbw_rl_\w+", text_of_all)) <= known


def test_the_panels_are_what_grafana_can_lay_out():
    model = json.loads(FILE.read_text(encoding="utf-8"))
    ids = [panel["id"] for panel in model["panels"]]
    assert len(ids) == len(set(ids))
    taken = set()
    for panel in model["panels"]:
        position = panel["gridPos"]
        assert 0 <= position["x"] <= position["x"] + position["w"] <= 24
        cells = {
            (x, y)
            for x in range(position["x"], position["x"] + position["w"])
            for y in range(position["y"], position["y"] + position["h"])
        }
        assert not cells & taken, f"{panel['title']} covers another panel"
        taken |= cells
    for panel in panels():
        assert panel["description"], panel["title"]
        assert [target["refId"] for target in panel["targets"]] == list("ABCDEFGH"[: len(panel["targets"])])
        assert all('instance=~"$instance"' in target["expr"] for target in panel["targets"])
    variables = {variable["name"] for variable in model["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", FILE.read_text(encoding="utf-8"))) - {"__rate_interval", "__all"}
    assert used == variables


def test_provisioning_leads_to_the_dashboard_and_to_the_shipped_prometheus():
    provider = (FOLDER / "grafana/provisioning/dashboards/lbw-rl.yml").read_text(encoding="utf-8")
    (path,) = re.findall(r"path: \$LBW_RL_MONITORING/(.+)", provider)
    assert (FOLDER / path / FILE.name).is_file()
    source = (FOLDER / "grafana/provisioning/datasources/prometheus.yml").read_text(encoding="utf-8")
    assert "http://127.0.0.1:9090" in source
    assert "http://" not in source.replace("http://127.0.0.1:9090", "")


def test_every_alert_is_tested_to_fire_and_to_stay_silent():
    tests = (FOLDER / "alerts_test.yml").read_text(encoding="utf-8")
    names = [name for name, _ in alerts()]
    assert len(names) == 9
    fires = re.findall(r"- alertname: (\w+)\n +eval_time: \w+\n +exp_alerts:\n +- exp_labels", tests)
    silent = re.findall(r"\{alertname: (\w+), eval_time: 30m, exp_alerts: \[\]\}", tests)
    assert sorted(fires) == sorted(names) == sorted(silent)


def test_the_document_lists_every_alert():
    told = (Path(__file__).parents[1] / "docs/monitoring.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(LbwRl\w+)` \|", told, re.MULTILINE) == [name for name, _ in alerts()]


# ---- what Prometheus says


@pytest.fixture(scope="session")
def prometheus(request):
    """Name → path of `prometheus` and `promtool`."""
    return programs(request.config.cache.mkdir("prometheus"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [("check", "config", "prometheus.yml"), ("check", "rules", "alerts.yml"), ("test", "rules", "alerts_test.yml")]
)  # fmt: skip
def test_promtool_finds_nothing_wrong(prometheus, arguments):
    done = subprocess.run([prometheus["promtool"], *arguments], cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def governed(nvml_stand_in, tmp_path_factory):
    """A governed run of two ranks, in two processes, and the port of its metrics; it ends well when the tests are done."""
    folder = tmp_path_factory.mktemp("governed")
    (folder / "script").write_text(GPU)
    driver = os.pathsep.join(filter(None, [str(nvml_stand_in["CURRENT_DRIVER"]), os.environ.get("LD_LIBRARY_PATH")]))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("CUDA_")}
    environment |= {"LD_LIBRARY_PATH": driver, "NVML_SCRIPT": str(folder / "script"), "OMP_NUM_THREADS": "1"}
    logs = [(folder / f"{rank}.log").open("w+") for rank in range(2)]
    ranks = [
        subprocess.Popen([sys.executable, WORKER, str(rank), "2", folder], stdout=logs[rank], stderr=logs[rank], env=environment)
        for rank in range(2)
    ]  # fmt: skip

    def said():
        return "".join((folder / f"{rank}.log").read_text() for rank in range(2))

    def started():
        assert all(process.poll() is None for process in ranks), said()
        return (folder / "port").exists()

    try:
        until(started, "rank 0 serves metrics")
        yield int((folder / "port").read_text())
        (folder / "stop").touch()
        assert [process.wait(120) for process in ranks] == [0, 0], said()
        summary, other = (json.loads((folder / f"{rank}.log").read_text().splitlines()[-1]) for rank in range(2))
        assert (summary.pop("serves"), other["serves"]) == (True, False)  # one rank speaks for all
        assert summary["faults"] == {"controller": 1}
        assert summary["skips"] > 0
        assert not summary["suspended"]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
        for log in logs:
            log.close()


@pytest.fixture(scope="module")
def watched(prometheus, governed, tmp_path_factory):
    """Prometheus under the shipped configuration, but for port and pace, when it has seen all that the run shows."""
    folder = tmp_path_factory.mktemp("prometheus")
    config = (FOLDER / "prometheus.yml").read_text(encoding="utf-8")
    changes = {"127.0.0.1:9464": f"127.0.0.1:{governed}", "scrape_interval: 5s": "scrape_interval: 1s"}
    changes["evaluation_interval: 15s"] = "evaluation_interval: 1s"
    for shipped, here in changes.items():
        assert config.count(shipped) == 1
        config = config.replace(shipped, here)
    (folder / "prometheus.yml").write_text(config, encoding="utf-8")
    shutil.copy(FOLDER / "alerts.yml", folder)
    with server(prometheus["prometheus"], folder / "prometheus.yml", folder / "data") as answering:
        until(lambda: answering.query("lbw_rl_skips_total > 0"), "the run has skipped")
        until(lambda: answering.query("lbw_rl_faults_total > 0"), "the run has had a fault")
        until(lambda: answering.query("count_over_time(lbw_rl_steps_total[1m]) >= 5"), "five scrapes")
        yield answering


@pytest.mark.slow
def test_a_real_prometheus_scrapes_every_metric_of_a_real_run(watched):
    assert watched.value('up{job="lbw-rl"}') == 1
    known = set(watched.get("label/__name__/values"))
    assert {family.name for family in FAMILIES} <= known
    types = {name: rows[0]["type"] for name, rows in watched.get("metadata").items() if name.startswith("lbw_rl_")}
    # Prometheus asks for OpenMetrics, where a counter's family is named without the suffix.
    assert types == {family.name.removesuffix("_total"): family.kind for family in FAMILIES}
    assert watched.value("lbw_rl_gpu_utilization_ratio") == pytest.approx(0.75)
    assert watched.value("lbw_rl_ranks") == 2
    assert watched.value("lbw_rl_collective_seconds") > 0
    assert watched.value("sum(lbw_rl_regime)") == 1
    assert watched.value("rate(lbw_rl_steps_total[10s])") > 0


@pytest.mark.slow
@pytest.mark.parametrize(("title", "expr"), EXPRESSIONS, ids=[f"{t}-{i}" for i, (t, _) in enumerate(EXPRESSIONS)])
def test_every_query_of_every_panel_returns_data(watched, title, expr):
    expr = expr.replace("$__rate_interval", "10s").replace("$job", ".*").replace("$instance", ".*")
    assert "$" not in expr
    until(lambda: watched.query(expr), f"{title}: {expr}")


@pytest.mark.slow
def test_every_alert_is_evaluated_on_the_run_and_the_idle_gpu_is_noticed(watched):
    def states():
        (group,) = watched.get("rules")["groups"]
        rules = {rule["name"]: rule for rule in group["rules"]}
        return rules if all(rule["health"] == "ok" for rule in rules.values()) else None

    rules = until(states, "the rules are evaluated")
    assert set(rules) == {name for name, _ in alerts()}
    until(lambda: states()["LbwRlGpuUnderused"]["state"] != "inactive", "75 % is under 92 %")
    assert not [name for name in ("LbwRlDiverging", "LbwRlStalled", "LbwRlControllerSuspended", "LbwRlExporterDown")
                if states()[name]["state"] != "inactive"]  # fmt: skip


@pytest.mark.slow
def test_every_series_that_an_alert_looks_at_is_there(watched):
    for name, expr in alerts():
        for selector in re.findall(r"(?:lbw_rl_\w+|up)(?:\{[^}]*\})?", expr):
            assert watched.query(selector), f"{name}: {selector}"


@pytest.mark.slow
def test_the_variables_of_the_dashboard_find_the_run(watched, governed):
    series = watched.get("series", **{"match[]": "lbw_rl_run_info"})
    assert [(s["job"], s["instance"], s["controller"]) for s in series] == [
        ("lbw-rl", f"127.0.0.1:{governed}", "entropic")
    ]


@pytest.mark.slow
def test_promtool_s_linter_has_no_complaint_about_a_scrape(prometheus, governed):
    with urllib.request.urlopen(f"http://127.0.0.1:{governed}/metrics", timeout=30) as answer:
        scraped = answer.read()
    done = subprocess.run([prometheus["promtool"], "check", "metrics"], input=scraped, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.slow
def test_the_command_line_serves_metrics_during_a_run_and_writes_event_files(prometheus, tiny, tmp_path):
    pytest.importorskip("tensorboard")
    port = free_port()
    settings = [part for s in [*tiny, "train.steps=100000", "train.eval_every=0"] for part in ("--set", s)]
    command = [
        sys.executable,
        "-c",
        "from lbw_rl.cli import main; main()",
        "run",
        "mini-qwen2",
        "--controller",
        "entropic",
    ]
    command += ["--out", str(tmp_path / "out"), "--metrics-port", str(port), "--tensorboard", *settings]
    config = (FOLDER / "prometheus.yml").read_text(encoding="utf-8").replace("9464", str(port))
    (tmp_path / "prometheus.yml").write_text(config.replace("scrape_interval: 5s", "scrape_interval: 1s"))
    shutil.copy(FOLDER / "alerts.yml", tmp_path)
    with (tmp_path / "log").open("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            with server(prometheus["prometheus"], tmp_path / "prometheus.yml", tmp_path / "data") as answering:

                def scraped():
                    assert process.poll() is None, (tmp_path / "log").read_text()
                    return answering.query("changes(lbw_rl_steps_total[1m]) >= 2")

                until(scraped, "three scrapes of a run that goes on")
                assert answering.value("lbw_rl_planned_steps") == 100_000
                assert [s["metric"]["mode"] for s in answering.query("lbw_rl_mode == 1")] == ["govern"]
        finally:
            process.kill()
            process.wait()
    assert list((tmp_path / "out/tensorboard").glob("events.out.tfevents.*"))
