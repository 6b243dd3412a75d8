"""Calibration errors in plain NumPy, sample by sample and bin by bin, written from their definitions.

They share no code with the package. Where another implementation draws bins differently, its reading is here too.
"""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

OFFICIAL_LOSSES = json.loads((Path(__file__).parent / "reference" / "losses.json").read_text())
OFFICIAL = json.loads((Path(__file__).parent / "reference" / "metrics.json").read_text())


def flat(value) -> torch.Tensor:
    """What a metric gives, a number, tensor or tuple of tensors, as one vector with -1 for nan."""
    parts = value if isinstance(value, tuple) else (value,)
    return torch.cat([part.reshape(-1) for part in parts]).nan_to_num(-1)


def official_inputs(key: str, n: int = 1000):
    """Logits and labels of the official runs, by formula."""
    k, s = {"K2": (2, 6.0), "K10": (10, 6.0), "K10_s12": (10, 12.0), "K100": (100, 6.0), "K100_s24": (100, 24.0)}[key]
    logits = waves(n, k, s)
    index = np.arange(n)
    rest = (index**3 + 3 * index + index // 5) % k
    target = np.where((37 * index) % 100 < 62, logits.argmax(1), rest)
    return torch.from_numpy(logits), torch.from_numpy(target)


def official_edges(key: str):
    """Probabilities and labels whose confidences lie on bin edges, and other extremes, by formula."""
    if key.startswith("all"):
        logits = torch.from_numpy(waves(20, 5, 6.0))
        right = logits.argmax(1)
        return logits.softmax(1), right if key.startswith("all_correct") else (right + 1) % 5
    if key == "edges_quarter_nb4":
        j, k = np.arange(24), 4
        confidence, top = np.array([0.25, 0.5, 0.75, 1.0])[(j // 3) % 4], (5 * j) % 4
        wrong, offset = j % 3 == 0, 1
    elif key == "edges_15ths_nb15":
        j, k = np.arange(28), 8
        confidence, top = np.repeat(np.arange(2, 16), 2) / 15, (3 * j) % 8
        wrong, offset = j % 3 == 1, 3
    elif key == "conf_all_one_nb15":
        j, k = np.arange(6), 3
        confidence, top, wrong, offset = np.ones(6), j % 3, np.isin(j, [1, 4]), 1
    else:
        j, k = np.arange(1), 4
        confidence, top, wrong, offset = np.array([0.7]), np.array([2]), np.array(["wrong" in key]), 3
    probs = np.repeat(((1 - confidence) / (k - 1))[:, None], k, 1)
    probs[j, top] = confidence
    predicted = probs.argmax(1)  # class 0 for uniform rows
    target = np.where(wrong, (predicted + offset) % k, predicted)
    return torch.from_numpy(probs), torch.from_numpy(target)


def waves(n: int, k: int, s: float) -> np.ndarray:
    i, j = np.arange(float(n))[:, None], np.arange(float(k))
    return s * np.sin(1.7 * i + 2.3 * j) + 0.5 * s * np.cos(0.37 * i * j)


def confidences(probs: np.ndarray, target: np.ndarray):
    return probs.max(1), (probs.argmax(1) == target).astype(float)


def binned(confidence, correct, n_bins=15, norm="l1", closed="right", debias=False):
    """Bin by bin: ``(lo, hi]``, or ``[lo, hi)`` with 1.0 in a bin of its own, as torchmetrics has it."""
    members = []
    for i in range(n_bins + (closed == "left")):
        if closed == "right":
            inside = (confidence > i / n_bins) & (confidence <= (i + 1) / n_bins)
            inside |= (i == 0) & (confidence <= 0)
        else:
            inside = (confidence >= i / n_bins) & (confidence < (i + 1) / n_bins)
        members.append(inside)
    return combined(confidence, correct, members, norm, debias)


def combined(confidence, correct, members, norm="l1", debias=False):
    """The gaps of sets of samples, combined."""
    n = sum(inside.sum() for inside in members)
    total = 0.0
    for inside in members:
        count = inside.sum()
        if not count:
            continue
        accuracy = correct[inside].mean()
        gap = abs(confidence[inside].mean() - accuracy)
        if norm == "l1":
            total += count / n * gap
        elif norm == "max":
            total = max(total, gap)
        elif not debias:
            total += count / n * gap**2
        elif count > 1:
            total += count / n * (gap**2 - accuracy * (1 - accuracy) / (count - 1))
    return np.sqrt(max(total, 0)) if norm == "l2" else total


def overconfidence(confidence, correct, n_bins=15):
    total = 0.0
    for i in range(n_bins):
        inside = (confidence > i / n_bins) & (confidence <= (i + 1) / n_bins)
        if inside.any():
            mean = confidence[inside].mean()
            total += inside.mean() * mean * max(mean - correct[inside].mean(), 0)
    return total


def adaptive(confidence, correct, n_bins=15, norm="l1"):
    """Bins of mass N / n_bins, filled sample by sample in the order of confidence; tied samples are averaged first."""
    order = np.argsort(confidence, kind="stable")
    confidence, correct = confidence[order], correct[order].astype(float)
    for value in np.unique(confidence):
        tied = confidence == value
        correct[tied] = correct[tied].mean()
    size, room = len(confidence) / n_bins, 0.0
    bins = [[0.0, 0.0, 0.0]]
    room = size
    for c, r in zip(confidence, correct, strict=True):
        left = 1.0
        while left > 1e-9:
            if room < 1e-9 and len(bins) < n_bins:
                bins.append([0.0, 0.0, 0.0])
                room = size
            part = left if len(bins) == n_bins else min(left, room)
            for slot, value in enumerate((1.0, c, r)):
                bins[-1][slot] += part * value
            left, room = left - part, room - part
    mass, sure, right = np.array(bins).T
    gap = abs(sure - right) / mass
    return {"l1": (mass * gap).sum() / mass.sum(), "l2": np.sqrt((mass * gap**2).sum() / mass.sum()), "max": gap.max()}[
        norm
    ]


def classwise(probs, target, n_bins=15):
    return np.mean([binned(probs[:, k], (target == k).astype(float), n_bins) for k in range(probs.shape[1])])


def smooth(confidence, correct, sigma, points=12_001):
    """The definition: residuals under a Gaussian reflected at 0 and 1, absolute value, integral."""
    t = np.linspace(0, 1, points)
    total = np.zeros(points)
    for c, r in zip(confidence, correct, strict=True):
        for image in range(-4, 5):
            for centre in (2 * image + c, 2 * image - c):
                total += (r - c) * np.exp(-((t - centre) ** 2) / (2 * sigma**2))
    integral = (abs(total).sum() - abs(total[[0, -1]]).sum() / 2) / (points - 1)
    return integral / (len(confidence) * sigma * np.sqrt(2 * np.pi))


def smooth_relplot(confidence, correct, sigma):
    """relplot's discretisation of it.

    Samples are shared by the two nearest of 1,001 nodes (more below sigma = 0.01). The reflected copies leave out the
    end nodes, so that what lies there, such as confidence 1, has half its weight. The kernel is cut off at distance
    1/2. The integral is a mean over 200 points, weighted by the smoothed density.
    """
    nodes = max(2000, round(20 / sigma)) // 2 + 1
    place = confidence * (nodes - 1)
    left = np.minimum(place.astype(int), nodes - 2)
    right_share = place - left

    def smoothed(values):
        mass = np.zeros(nodes)
        np.add.at(mass, left, values * (1 - right_share))
        np.add.at(mass, left + 1, values * right_share)
        t, x = np.linspace(0, 1, nodes), np.arange(nodes) / (nodes - 1)
        result = np.zeros(nodes)
        for positions, weights in ((x, mass), (-x[1:], mass[1:]), (2 - x[:-1], mass[:-1])):
            distance = abs(t[:, None] - positions)
            kernel = np.where(distance <= 0.5, np.exp(-(distance**2) / (2 * sigma**2)), 0)
            result += kernel @ weights
        mesh = np.linspace(0, 1, max(200, round(10 / sigma)))
        return np.interp(mesh, t, result) / (sigma * np.sqrt(2 * np.pi))

    return abs(smoothed(confidence - correct)).sum() / (smoothed(np.ones_like(confidence)) + 1e-4).sum()


def adaptive_torrvision(confidence, correct, n_bins=15):
    """Edges interpolated between the sorted confidences, ``(lo, hi]``: the least confident sample is in no bin."""
    n = len(confidence)
    edges = np.interp(np.linspace(0, n, n_bins + 1), np.arange(n), np.sort(confidence))
    total = 0.0
    for low, high in pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            total += inside.mean() * abs(confidence[inside].mean() - correct[inside].mean())
    return total


def equal_mass_netcal(confidence, correct, n_bins=15):
    """Edges at the quantiles, ``[lo, hi)``."""
    edges = np.quantile(confidence, np.linspace(0, 1, n_bins + 1))
    edges[0], edges[-1] = 0, 1
    index = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, n_bins - 1)
    return combined(confidence, correct, [index == i for i in range(n_bins)])


def equal_mass_verified(confidence, correct, n_bins=15, norm="l1", debias=False):
    """Edges midway between the parts of an even split of the sorted confidences, ``(lo, hi]``."""
    parts = np.array_split(np.sort(confidence), n_bins)
    edges = [(a[-1] + b[0]) / 2 for a, b in pairwise(parts)]
    index = np.searchsorted(np.unique(edges), confidence, side="left")
    return combined(confidence, correct, [index == i for i in range(n_bins)], norm, debias)


def errors_answered(confidence, correct):
    """Errors among the k most confident rows, k = 1 ... N, averaged over the orders of rows of equal confidence."""
    errors, before = [], 0.0
    for value in np.unique(confidence)[::-1]:
        wrong = 1 - correct[confidence == value].astype(float)
        errors += [before + wrong.mean() * (j + 1) for j in range(len(wrong))]
        before += wrong.sum()
    return np.array(errors)


def aurc(confidence, correct, excess=False, generalized=False):
    """Mean over k of the errors among the k most confident rows, per row of these or, generalized, of all."""
    n = len(confidence)
    rows = np.full(n, n) if generalized else np.arange(1, n + 1)
    area = (errors_answered(confidence, correct) / rows).mean()
    best = (np.cumsum(np.sort(1 - correct.astype(float))) / rows).mean()
    return area - best if excess else area


def aurc_torch_uncertainty(confidence, correct, generalized=False):
    """The trapezoid rule over the coverages 1/N ... 1, over the width of that interval."""
    n = len(confidence)
    rows = np.full(n, n) if generalized else np.arange(1, n + 1)
    risk = errors_answered(confidence, correct) / rows
    return ((risk[:-1] + risk[1:]) / 2).sum() / (n - 1)


def accuracy_at_coverage(confidence, correct, rows):
    """Accuracy of so many rows, the most confident ones."""
    return 1 - errors_answered(confidence, correct)[rows - 1] / rows


def coverage_at_accuracy(confidence, correct, accuracy):
    """The largest share of rows above any threshold of which so many are right."""
    shares = [0.0]
    for threshold in confidence:
        inside = confidence >= threshold
        if correct[inside].mean() >= accuracy:
            shares.append(inside.mean())
    return max(shares)
