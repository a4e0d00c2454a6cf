"""
Fig. 12: does a head that sees one patch fit the data better than one that sees the image?

The paper draws this toy but does not describe it.  Ours: points on a tree in the plane, which is
cut into square cells.  A backbone knows the time and the cell of the noisy point, and makes a token
of them.  A head takes the token and the point, and draws the clean point.  "Patch": it gets the
point within its cell, from -1 to 1.  "Image": its place in the plane.  "Image, enlarged": that
place in units of half a cell, to separate locality from mere scale.
"""

from functools import cache

import numpy as np
import torch
import torch.nn as nn
from scipy.spatial import cKDTree

from dip import MIN_TIME, TimeEmbedding
from sample import heun, random_stream

CELL, GRID, WIDTH = 0.25, 32, 64             # side of a cell, cells a side, units of a layer
TRAINING = dict(batch_size=256, micro_batch=256, label_dropout=0.0, time_mean=-1.0)
VIEWS = {"patch": lambda x, centre: (x - centre) / (CELL / 2), "image": lambda x, centre: x,
         "image, enlarged": lambda x, centre: x / (CELL / 2)}


def tree(start=(0.0, -0.95), angle=np.pi / 2, length=0.62, levels=5):
    """Segments (n, 2, 2) of a tree in [-1, 1]^2: every branch forks into two shorter ones."""
    end = start[0] + length * np.cos(angle), start[1] + length * np.sin(angle)
    return [(start, end)] + [segment for turn in (-0.55, 0.55) if levels > 1
                             for segment in tree(end, angle + turn, 0.68 * length, levels - 1)]


@cache
def on_the_tree(n, seed):
    """n points, uniform along the branches.  (n, 2)"""
    segments, rng = np.array(tree()), np.random.default_rng(seed)
    lengths = np.linalg.norm(segments[:, 1] - segments[:, 0], axis=1)
    chosen = segments[rng.choice(len(segments), n, p=lengths / lengths.sum())]
    return chosen[:, 0] + rng.random((n, 1)) * (chosen[:, 1] - chosen[:, 0])


def draw_point(index):
    """Training point `index` as an image (1, 1, 2), in levels from 0 to 255, not rounded."""
    return ((on_the_tree(100_000, 0)[index] + 1) * 127.5).astype(np.float32)[None, None]


class ToyNet(nn.Module):
    """The velocity of a point: a backbone sees its cell, a head sees view(x, the cell's centre)."""

    def __init__(self, config, view):
        super().__init__()
        self.config, self.view, self.time = config, view, TimeEmbedding(WIDTH)
        self.place = nn.Embedding(GRID**2, WIDTH)
        self.backbone = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.head = nn.Sequential(nn.Linear(2 + WIDTH, WIDTH), nn.SiLU(),
                                  nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 2))

    def forward(self, x_t, t, y):
        """x_t (B, 2, 1, 1), t (B,) -> (B, 2, 1, 1)"""
        x = x_t.flatten(1)                                               # (B, 2)
        cell = (x / CELL).floor()                                        # (B, 2)
        column, row = (cell.long() + GRID // 2).clamp(0, GRID - 1).T
        s = self.backbone(self.place(row * GRID + column) + self.time(t))        # (B, WIDTH)
        clean = self.head(torch.cat([self.view(x, (cell + 0.5) * CELL), s], dim=1))
        return ((x - clean) / t.clamp(min=MIN_TIME)[:, None]).view(x_t.shape)


@torch.no_grad()
def measure(lab, model, net):
    """Mean distance of samples to the tree, and of points of the tree to the nearest sample."""
    n = 100 if lab.quick else 4000
    noise, net = torch.randn(n, 2, 1, 1, generator=random_stream("tree")), net.cpu()
    points = heun(lambda x, t: net(x, torch.full((n,), t), None), noise, 50)
    points, truth = points.flatten(1).double().numpy(), on_the_tree(20 * n, 1)
    return dict(to_tree=float(cKDTree(truth).query(points)[0].mean()),
                from_tree=float(cKDTree(points).query(truth[:n])[0].mean()))
