"""Measurements that anyone can rerun: `python -m lbw_rl.training_runs.benchmarks.NAME`."""
