"""Clusters around peaks of density, a second time, by loops."""

from __future__ import annotations

import math

from torch import Tensor


def clusters_of(tokens: list[Tensor], count: int) -> dict[int, list[int]]:
    """The members of each center, by loops; numbers in the list."""
    n, width = len(tokens), len(tokens[0])
    far = [[float((a - b).pow(2).sum() / width) ** 0.5 for b in tokens] for a in tokens]
    density = [math.exp(-sum(x * x for x in sorted(row)[:count]) / count) for row in far]
    most = max(map(max, far))
    worth = []
    for i in range(n):
        denser = [far[i][j] for j in range(n) if density[j] > density[i] or (density[j] == density[i] and j < i)]
        worth.append(min([*denser, most]) * density[i])
    centers = sorted(sorted(range(n), key=lambda i: (-worth[i], i))[:count])
    found: dict[int, list[int]] = {center: [] for center in centers}
    for i in range(n):
        found[i if i in found else min(centers, key=lambda c, i=i: (far[i][c], c))].append(i)  # type: ignore[misc]
    return found
