"""The stress suite: the learning-rate axis of many families of runs, a governor against the strongest rivals."""
