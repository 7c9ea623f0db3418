"""What a production run imports: no environment, no learner, no model library, no plotting."""

import json
import subprocess
import sys

import pytest

HEAVY = ["gymnasium", "stable_baselines3", "transformers", "datasets", "pandas", "plotly", "matplotlib", "ray", "scipy"]
HEAVY += ["prometheus_client", "tensorboard"]


def loaded_by(program: str, *arguments: str) -> set[str]:
    """Top-level packages in `sys.modules` after `program` ran in an interpreter of its own."""
    report = "\nimport json, sys; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    done = subprocess.run(
        [sys.executable, "-c", program + report, *arguments], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


CONTROLLERS = """
import sys, lbw_rl
for name in ("constant", "pid", "entropic", "lbw-guard", "random", "open-loop", sys.argv[1]):
    lbw_rl.load_controller(name).act(lbw_rl.Telemetry())
"""


@pytest.mark.parametrize("program", ["import lbw_rl", CONTROLLERS], ids=["import", "every controller"])
def test_controllers_and_a_frozen_policy_need_numpy_alone(program, policy_folder):
    packages = loaded_by(program, str(policy_folder))
    assert {"lbw_rl", "numpy"} <= packages
    assert not {"torch", *HEAVY} & packages


def test_the_governor_needs_torch_and_nothing_of_the_learning_side():
    packages = loaded_by("import lbw_rl; lbw_rl.Governor")
    assert "torch" in packages
    assert not set(HEAVY) & packages
