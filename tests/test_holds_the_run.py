"""What the package is for: a run with a wrong learning rate ends as well as one with the right one."""

import pytest

from lbw_rl.envs.recipe import load_recipe, override
from lbw_rl.training_runs.run import run

TUNED = ("train.lr_multiplier=0.67", "schedule.name=constant")
"""AdamW's best rate and schedule on this recipe (docs/benchmarks.md)."""


@pytest.fixture(scope="module")
def perplexity(tmp_path_factory):
    def measure(*settings):
        recipe = override(load_recipe("mini-qwen2"), [*settings, "train.eval_every=0", "train.threads=1"])
        return run(recipe, tmp_path_factory.mktemp("run"))["final_ppl"]

    return measure


@pytest.fixture(scope="module")
def tuned(perplexity):
    return perplexity(*TUNED)


@pytest.mark.slow
@pytest.mark.parametrize(("multiplier", "bound"), [("0.03333", 1.10), ("1.0", 1.02), ("30.0", 1.10)])
def test_the_guard_holds_the_run(perplexity, tuned, multiplier, bound):
    """`lbw-guard` at 1/30, 1 and 30 × the rate, against AdamW tuned over rate and schedule; one seed."""
    governed = perplexity(f"train.lr_multiplier={multiplier}", 'controller.name="lbw-guard"')
    assert governed <= bound * tuned


@pytest.mark.slow
@pytest.mark.parametrize("multiplier", ["0.03333", "30.0"])
def test_without_it_clipping_does_not(perplexity, tuned, multiplier):
    """The stress is real: AdamW with clipping ends at more than twice the tuned perplexity."""
    assert perplexity(f"train.lr_multiplier={multiplier}", "optimizer.grad_clip=1.0") > 2 * tuned
