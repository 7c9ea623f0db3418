"""Governed runs with an exporter, and its page."""

import urllib.error
import urllib.request

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from lbw_rl import Controller, Governor

pytest.importorskip("prometheus_client", reason="needs the extra lbw-rl[metrics]")


class Scripted(Controller):
    """Proposes one and the same action."""

    name = "scripted"
    time_limit = None

    def __init__(self, action):
        self.action = action

    def reset(self, context):
        pass

    def act(self, telemetry):
        return self.action


class Loop:
    """A governed training loop, a step at a time."""

    def __init__(self, model, *sinks, controller="constant", **options):
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        self.governor = Governor(self.optimizer, controller, sinks=sinks, **{"measure_device": False} | options)

    def step(self, loss_factor=1.0):
        number = self.governor.step
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(number))
        loss = self.model(x).pow(2).mean() * loss_factor
        loss.backward()
        self.governor.observe(loss, tokens=32)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.governor.close()


def page(exporter):
    with urllib.request.urlopen(f"http://127.0.0.1:{exporter.port}/metrics", timeout=60) as answer:
        return answer.read().decode()


def scrape(exporter):
    """(name, labels…) → value, by Prometheus' own parser."""
    samples = [s for family in text_string_to_metric_families(page(exporter)) for s in family.samples]
    found = {(s.name, *s.labels.values()): s.value for s in samples}
    assert len(found) == len(samples)  # a duplicate would fail the whole scrape
    return found
