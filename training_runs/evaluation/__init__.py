"""Judges frozen policies, rules and tuned optimizers on families of runs that no policy was trained on."""
