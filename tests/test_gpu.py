"""What only a CUDA device can show: `make gpu-check`. Everywhere else these tests are skipped."""

import math
from contextlib import contextmanager

import pytest
import torch

from lbw_rl import Authority, Governor

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@contextmanager
def syncs_are_errors():
    """Around the steps alone: moving a model to the device waits for it, rightly."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def build(**options):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4)
    ).cuda()
    return model, torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-3, device="cuda"), **options)


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True, "capturable": True}], ids=["fused", "foreach"])
@pytest.mark.parametrize("decide_every", [1, 4])
def test_no_decision_waits_for_the_device(options, decide_every):
    model, optimizer = build(**options)
    authority = Authority(lr_scale=(1e-3, 100.0), max_rollbacks=1, snapshot_every=3)
    governor = Governor(
        optimizer, "lbw-guard", model=model, total_steps=32, authority=authority, decide_every=decide_every
    )
    tokens = torch.randint(0, 512, (4, 64), device="cuda")

    def step():
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()  # the first makes state and caches
    with syncs_are_errors():
        for _ in range(31):
            step()
    assert governor.summary()["faults"] == {}  # a refused sync would have been swallowed, and counted
    assert governor.last_telemetry.update_ratio > 0
    governor.close()


def test_a_poisoned_step_is_withheld_on_the_device():
    model, optimizer = build(fused=True)
    governor = Governor(optimizer, "constant", model=model)
    tokens = torch.randint(0, 512, (4, 64), device="cuda")
    for step in range(6):
        loss = model(input_ids=tokens, labels=tokens).loss
        (loss * math.nan if step == 3 else loss).backward()
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        if step == 3:
            assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        optimizer.zero_grad()
    assert governor.summary()["skips"] == 1
    governor.close()


def test_nvml_reads_this_card():
    from lbw_rl.device import DeviceSource

    source = DeviceSource()
    assert source.wait(10)
    signals = source.read()
    assert {"gpu_utilization", "gpu_memory", "gpu_temperature"} <= set(signals)
    assert 0 < signals["gpu_memory"] <= 1
    source.close()
