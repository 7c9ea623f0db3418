"""What a production run imports: no environment, no learner, no model library, no plotting."""

import json
import subprocess
import sys

import pytest

HEAVY = ["gymnasium", "stable_baselines3", "transformers", "datasets", "pandas", "plotly", "matplotlib", "ray", "scipy"]


def loaded_by(program: str, *arguments: str) -> set[str]:
    """Top-level packages in `sys.modules` after `program` ran in an interpreter of its own."""
    report = "\nimport json, sys; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    done = subprocess.run(
        [sys.executable, "-c", program + report, *arguments], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "program",
    [
        "import lbw_rl",
        "import sys, lbw_rl\n"
        "for name in ('constant', 'pid', 'entropic', 'lbw-guard', 'random', sys.argv[1]):\n"
        "    lbw_rl.load_controller(name).act(lbw_rl.Telemetry())",
    ],
    ids=["import", "every controller"],
)
def test_the_core_and_a_frozen_policy_run_without_the_learning_side(program, policy_folder):
    assert not set(HEAVY) & loaded_by(program, str(policy_folder))
