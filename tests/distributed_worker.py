"""One rank of governed runs, started by torchrun: `distributed_worker.py KIND SCENARIO,… OUT`. See test_distributed.py."""

import contextlib
import copy
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import lbw_rl.sgd_rate
from lbw_rl import Action, Authority, Controller, Directive, Governor
from lbw_rl.controllers.entropic import EntroPIC

STEPS = 24
BATCH = 4  # sequences in all, whatever the number of ranks


class Acts(Controller):
    """Asks for one rollback at step 12, and for a rate that follows the loss."""

    name = "acts"

    def reset(self, context):
        pass

    def act(self, telemetry):
        directive = Directive.ROLLBACK if telemetry.step == 12 else Directive.PROCEED
        return Action(lr_scale=min(2.0, 4.0 / max(telemetry.loss, 1.0)), directive=directive)


class HandsOver(Acts):
    """Two phases of SGD, with a rollback in the first one that leads back to before it."""

    name = "hands-over"

    def act(self, telemetry):
        directive = Directive.ROLLBACK if telemetry.step == 13 else Directive.PROCEED
        return Action(hand_over=telemetry.step in {*range(11, 15), *range(17, 22)}, directive=directive)


def build(kind, world):
    torch.manual_seed(0)
    sizes = {"vocab_size": 67, "hidden_size": 36, "intermediate_size": 70, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    model = (
        Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, tie_word_embeddings=True))
        if kind == "fsdp"  # tied embeddings, biases
        else LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    )
    if kind.startswith("ddp"):
        return DistributedDataParallel(model)
    if kind.startswith(("fsdp", "hsdp")):
        shape = (2, world // 2) if kind.startswith("hsdp") else (world,)
        names = ("replicate", "shard") if kind.startswith("hsdp") else ("shard",)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def batch(step, rank, world):
    tokens = torch.randint(0, 67, (BATCH, 16), generator=torch.Generator().manual_seed(step))
    return tokens.view(world, BATCH // world, 16)[rank]


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def assemble(kind, scenario, out, rank, world):
    """Model, optimizer, scheduler and governor, as a training script builds them."""
    model = build(kind, world)  # "alone-under-gloo": replicas that nothing but governance joins
    # Weights that stay where they are, so that entropies are of the same gradients at every step.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0 if scenario == "entropy" else 2e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    options = {
        "authority": Authority(lr_scale=(1e-3, 100.0), slew_up=3.0, max_rollbacks=2, snapshot_every=5),
        "total_steps": STEPS,
        "ledger": out / "ledger.jsonl",
        "model": model,
        "stateful": {"scheduler": scheduler},
        "measure_device": scenario in ("slow-rank", "entropy"),
        "late": scenario.startswith("late"),
        "decide_every": 5 if scenario == "between" else 1,
    }
    if scenario == "differing-settings":
        options["total_steps"] = STEPS + rank
    if scenario == "dead-rank":
        options["collective_timeout"] = 5.0
    if scenario == "hand-over":
        lbw_rl.sgd_rate.HALF_LIFE, lbw_rl.sgd_rate.TOLERANCE = 5.0, 2.0  # a short run has no long averages
        options["authority"] = Authority(hand_over=True, max_rollbacks=2, snapshot_every=5)
    if scenario == "kill-switch":
        options |= {"control": out / "control", "kill_signal": signal.SIGUSR1}
    own = {"rollback": Acts(), "idle": "constant", "hand-over": HandsOver(), "entropy": EntroPIC(micro=True)}
    controller = own.get(scenario, "lbw-guard")
    governor = None if scenario == "ungoverned" else Governor(optimizer, controller, **options)
    return model, optimizer, scheduler, governor


def backward(model, tokens, scenario):
    """The gradient of one step, in two micro-batches where they are accumulated; returns the loss."""
    micro_batches = tokens.chunk(2) if scenario == "accumulated" else [tokens]
    for i, micro in enumerate(micro_batches):
        last = i == len(micro_batches) - 1
        wait = contextlib.nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync()
        with wait:
            loss = model(input_ids=micro, labels=micro).loss
            if not scenario.endswith("nan-loss"):
                (loss / len(micro_batches)).backward()
    return loss


def train(kind, scenario, out, rank, world):
    out.mkdir(exist_ok=True)
    model, optimizer, scheduler, governor = assemble(kind, scenario, out, rank, world)
    events = {}
    for step in range(STEPS):
        tokens = batch(step, rank, world)
        loss = backward(model, tokens, scenario)
        if scenario.endswith("nan-loss"):
            loss = loss * float("nan") if step == 12 and rank == world - 1 else loss
            loss.backward()
            governor.observe(loss)
        if scenario == "between" and step == 7:
            for p in model.parameters():
                p.grad.fill_(float("nan"))
        if step % 2:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if scenario == "slow-rank" and step in (5, 6) and rank == 1:
            time.sleep(1.0)
        if scenario == "dead-rank" and step == 8 and rank == world - 1:
            os.kill(os.getpid(), signal.SIGKILL if out.parent.name == "killed" else signal.SIGSTOP)
        if scenario == "kill-switch" and rank == 0 and step == 6:
            (out / "control").write_text("skip")
            time.sleep(1.2)  # the file is looked at twice a second
        if scenario == "kill-switch" and step == 12 and rank == world - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        if scenario == "disagreement" and step == 8 and rank == world - 1:
            governor.controller._plant._log_gain.mean += 0.5
        before = [p.detach().clone() for p in model.parameters()]
        began = time.monotonic()
        try:
            optimizer.step()
        except RuntimeError as e:
            seconds = time.monotonic() - began
            (out / f"error.{rank}.json").write_text(json.dumps([type(e).__name__, str(e), seconds]))
            os._exit(3)
        if all(torch.equal(full(a), full(b.detach())) for a, b in zip(before, model.parameters(), strict=True)):
            events.setdefault("unchanged", []).append(step)
        scheduler.step()
        optimizer.zero_grad()
        if scenario == "resumed" and step == 11:
            parts = (model, optimizer, scheduler, governor)
            states = [copy.deepcopy(part.state_dict()) for part in parts]
            governor.close()
            model, optimizer, scheduler, governor = parts = assemble(kind, scenario, out, rank, world)
            for part, state in zip(parts, states, strict=True):
                part.load_state_dict(state)
    weights = [full(p.detach()) for p in model.parameters()]
    events["bits"] = hashlib.sha256(b"".join(w.numpy().tobytes() for w in weights)).hexdigest()
    events["finite"] = all(bool(w.isfinite().all()) for w in weights)
    if governor is not None:
        governor.close()
        events |= {"summary": governor.summary(), "mode": governor.mode}
    if rank == 0:
        torch.save(weights, out / "weights.pt")
    (out / f"events.{rank}.json").write_text(json.dumps(events))


def main():
    kind, scenarios, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    torch.set_num_threads(1)
    rank, world = 0, 1
    if kind != "single":
        dist.init_process_group("gloo")
        rank, world = dist.get_rank(), dist.get_world_size()
    for scenario in scenarios.split(","):
        train(kind, scenario, out / scenario, rank, world)
    if kind != "single":
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
