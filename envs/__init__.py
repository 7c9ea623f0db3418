"""LLM training as Gymnasium environments.

Importing this package registers, where Gymnasium is installed:

- `lbw_rl/LLMTraining-v0`: one real training run (`lbw_rl.envs.llm_training`);
- `lbw_rl/ProxyTraining-v0`: a fleet of proxies as one batched program (`lbw_rl.envs.proxy_training`).
"""

from importlib.util import find_spec

if find_spec("gymnasium") is not None:
    from gymnasium.envs.registration import register

    # Entry points are strings: nothing heavy is imported before an environment is made.
    register(id="lbw_rl/LLMTraining-v0", entry_point="lbw_rl.envs.llm_training:LLMTrainingEnv", nondeterministic=True)
    register(id="lbw_rl/ProxyTraining-v0", vector_entry_point="lbw_rl.envs.proxy_training:ProxyTrainingVectorEnv")
