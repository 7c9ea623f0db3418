"""The entropies by their definitions, in float64 and over every element: what the fast path has to equal."""

import numpy as np

from lbw_rl.entropy import ENTROPY_BINS


def shannon(p):
    p = np.asarray(p, float)
    p = p[p > 0]
    return -np.sum(p * np.log(p))


def softmax(g):
    weights = np.exp(np.abs(g) - np.abs(g).max())
    return shannon(weights / weights.sum()) / np.log(g.size)


def histogram(g):
    with np.errstate(divide="ignore"):
        magnitude = np.clip(np.log2(np.abs(g) / np.sqrt(np.mean(g**2))), -24, 8 - 1e-9)
    counts, _ = np.histogram(magnitude, bins=ENTROPY_BINS, range=(-24, 8))
    return shannon(counts / g.size) / np.log(ENTROPY_BINS)


def element(g):
    return shannon(g**2 / np.sum(g**2)) / np.log(g.size)


def tensor(tensors):
    energy = np.array([np.sum(np.asarray(t, float) ** 2) for t in tensors])
    return shannon(energy / energy.sum()) / np.log(len(tensors))


def direction(g, mean):
    q = np.sum(g[np.sign(g) == np.sign(mean)] ** 2) / np.sum(g**2)
    return shannon([q, 1 - q]) / np.log(2)
