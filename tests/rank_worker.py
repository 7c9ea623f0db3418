"""One rank of several runs, each in a process of its own: `rank_worker.py JOBS.json`. See test_run_ranks.py."""

import json
import os
import signal
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import peft
import torch
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM  # noqa: F401

from lbw_rl import Directive
from lbw_rl.controllers.lbw_guard import LBWGuard
from lbw_rl.envs.parallel import parallelise, whole, whole_weights
from lbw_rl.envs.ranks import joined
from lbw_rl.envs.recipe import recipe_from_dict
from lbw_rl.training_runs.run import run

RANK = int(os.environ.get("RANK", 0))


class Witness(LBWGuard):
    """LBW-Guard that asks for one rollback, at step 7, and remembers what it answered."""

    def reset(self, context):
        super().reset(context)
        self.answers = []

    def act(self, telemetry):
        action = super().act(telemetry)
        if telemetry.step == 7:
            action = replace(action, directive=Directive.ROLLBACK)
        self.answers.append([telemetry.step, telemetry.loss, action.lr_scale, action.regime])
        return action


def train(out, recipe, resume=False, witness=False, die=None):
    """A run of a recipe; `die`: ranks that are killed, and after which step."""

    def kill(done, total, loss):
        if die is not None and RANK in die[0] and done == die[1]:
            os.kill(os.getpid(), signal.SIGKILL)

    controller = Witness() if witness else None
    summary = run(recipe_from_dict(recipe), out, resume=resume, controller=controller, progress=kill)
    return {"summary": summary, "answers": controller.answers if witness else None}


def adapt(how):
    """Losses and weights of LoRA adapters, most weights frozen and bfloat16, the adapters float32."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 67, "hidden_size": 16, "intermediate_size": 30, "num_hidden_layers": 2}
    config = Qwen2Config(**sizes, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)
    base = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
    with joined("cpu") as ranks:
        owner, forward = parallelise(model, how, torch.device("cpu"), ranks)
        trained = [p for p in owner.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        losses = []
        for step in range(5):
            (tokens,) = ranks.micro_batches(
                torch.randint(67, (4, 12), generator=torch.Generator().manual_seed(step)), 4
            )
            optimizer.zero_grad()
            loss = forward(input_ids=tokens, labels=tokens).loss
            loss.backward()
            norm = whole(torch.nn.utils.clip_grad_norm_(trained, 0.1))
            losses.append([float(ranks.mean(loss.detach())), float(norm)])
            optimizer.step()
        weights = whole_weights(owner.state_dict(), owner, ranks)
        if how == "fsdp" and ranks.world > 1:
            assert sum(isinstance(m, FSDPModule) for m in owner.modules()) == 3  # each layer, and the rest
        if ranks.leads:
            losses.append(sorted(float(w.float().norm()) for name, w in weights.items() if "lora" in name))
    return losses


def agree():
    """What ranks tell each other: an error of one is that of all."""

    def fail_on(rank):
        if rank == RANK:
            raise ValueError(f"corpus: rank {rank} has none; accepted: one")
        return rank

    said = []
    with joined("cpu") as ranks:
        for act in (
            lambda: ranks.together(lambda: fail_on(1)),
            lambda: ranks.in_turn(lambda: fail_on(0)),
            lambda: ranks.first(lambda: fail_on(0)),
            lambda: ranks.together(lambda: (_ for _ in ()).throw(KeyError(lambda: "no pickle"))),
        ):
            try:
                act()
            except Exception as error:
                said.append(f"{type(error).__name__}: {str(error)[:45]}")
        return [
            *said,
            ranks.first(lambda: fail_on(1)),
            ranks.in_turn(lambda: RANK),
            ranks.everybodys(RANK),
            ranks.collected(RANK),
            float(ranks.mean(torch.tensor(float(RANK)))),
            [part.tolist() for part in ranks.micro_batches(torch.arange(12), 4)],
        ]


KINDS = {"train": train, "adapt": adapt, "agree": agree}


def main():
    for name, (kind, port, folder, arguments) in json.loads(Path(sys.argv[1]).read_text()).items():
        child = os.fork()  # torch has not computed yet
        if child == 0:
            os.environ["MASTER_PORT"] = str(port)
            torch.set_num_threads(1)
            path = Path(folder) / f"{name}.{RANK}.json"
            try:
                answer = {"answer": KINDS[kind](**arguments)}
            except Exception as error:
                traceback.print_exc()
                answer = {"error": type(error).__name__, "message": str(error)}
            path.write_text(json.dumps(answer))
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
