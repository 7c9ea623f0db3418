"""EntroPIC with all that it has, over a real language model: bursts, rollbacks, hand-overs, and a resume among them."""

import copy

import pytest
import torch

from lbw_rl import Authority, Governor, split_parameter_groups
from lbw_rl.controllers.entropic import EntroPIC

STEPS, RESUMED_AT = 150, 83
AUTHORITY = Authority(
    lr_scale=(1e-3, 100.0), max_rollbacks=3, rollback_cooldown=5, snapshot_every=10, hand_over=True
)  # fmt: skip


def everything():
    return EntroPIC(
        target="auto",
        warmup=5,
        recalibrate=20,
        band=(0.96, 1.04),
        pause=2,
        cooldown=5,
        micro=True,
        hand_over_below=0.97,
        patience=2,
    )


class Run:
    """A governed run in a plain loop, with a burst in one tensor at steps 60 to 64 and batches that repeat."""

    def __init__(self, make_lm, **options):
        self.model = make_lm()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)
        split_parameter_groups(self.optimizer)
        self.governor = Governor(
            self.optimizer,
            everything(),
            model=self.model,
            authority=AUTHORITY,
            total_steps=STEPS,
            measure_device=False,
            **options,
        )

    def train(self, tokens, steps):
        for step in steps:
            x = tokens(step if step % 40 < 35 else 1)
            self.model(input_ids=x, labels=x).loss.backward()
            if 60 <= step < 65:
                next(p for p in list(self.model.parameters())[1:] if p.ndim >= 2).grad.mul_(1e4)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    def weights(self):
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


@pytest.mark.parametrize(
    ("options", "acts"),
    [
        ({}, {"skips", "rollbacks", "hand_overs"}),
        ({"late": True}, {"rollbacks"}),
        ({"decide_every": 4}, {"skips", "rollbacks"}),
        ({"mode": "lr"}, {"skips", "hand_overs"}),
        ({"mode": "shadow"}, {"skips", "rollbacks", "hand_overs"}),
    ],
    ids=["govern", "late", "every-4", "lr", "shadow"],
)
def test_whatever_it_does_a_resumed_run_ends_with_the_same_bits(make_lm, tokens, options, acts):
    straight = Run(make_lm, **options).train(tokens, range(STEPS))
    first = Run(make_lm, **options).train(tokens, range(RESUMED_AT))
    states = [copy.deepcopy(part.state_dict()) for part in (first.model, first.optimizer, first.governor)]
    first.governor.close()
    second = Run(make_lm, **options)
    for part, state in zip((second.model, second.optimizer, second.governor), states, strict=True):
        part.load_state_dict(state)
    second.train(tokens, range(RESUMED_AT, STEPS))

    summary = straight.governor.summary()
    assert summary["faults"] == {}
    assert acts <= {name for name in ("skips", "rollbacks", "hand_overs") if summary[name]}
    assert straight.weights().isfinite().all()
    assert torch.equal(second.weights(), straight.weights())
    own = second.governor.summary()
    assert {k: own[k] for k in summary if k != "overhead_seconds"} == {
        k: v for k, v in summary.items() if k != "overhead_seconds"
    }
    for run in (straight, second):
        run.governor.close()
