"""The families of models that a fleet can be of: one file each, one contract (`lbw_rl.envs.families.family`)."""
