"""
Fig. 12: does a head that sees one patch fit the data manifold better than one that sees the image?

The paper draws this toy but does not describe it.  Ours: points on a tree in the plane, by flow
matching.  The plane is cut into square cells.  A backbone knows in which cell the noisy point is,
and t, and makes a token of it; a head takes the token and the point, and draws the clean point.
"Patch": the head is given the point within its cell, from -1 to 1.  "Image": its place in the
plane.  "Image, enlarged": that place in units of half a cell, to tell locality from mere scale.
The three have equally many weights.

The design was chosen by how well any of the three fits: with larger cells, tokens made of the
cell's centre and velocities instead of clean points, none of them found the branches.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn as nn
from scipy.spatial import cKDTree

from common import random_stream
from dip import MIN_TIME, TimeEmbedding
from experiments.models import WIDE, Model, OneClass
from experiments.report import COLOURS, Claim, by_seed
from sample import heun

CELL, GRID, WIDTH, POINTS = 0.25, 32, 64, 4000   # side of a cell, cells a side, units, samples


def tree(start=(0.0, -0.95), angle=np.pi / 2, length=0.62, level=0, levels=5):
    """Segments (n, 2, 2) of a tree in [-1, 1]^2: every branch forks into two shorter ones."""
    end = start[0] + length * np.cos(angle), start[1] + length * np.sin(angle)
    segments = [(start, end)]
    if level + 1 < levels:
        for turn in (-0.55, 0.55):
            segments += tree(end, angle + turn, 0.68 * length, level + 1, levels)
    return segments


def on_the_tree(n, seed):
    """n points, uniform along the branches.  (n, 2)"""
    segments, rng = np.array(tree()), np.random.default_rng(seed)
    lengths = np.linalg.norm(segments[:, 1] - segments[:, 0], axis=1)
    chosen = segments[rng.choice(len(segments), n, p=lengths / lengths.sum())]
    return chosen[:, 0] + rng.random((n, 1)) * (chosen[:, 1] - chosen[:, 0])


class TreeData(OneClass):
    """Points as images of one pixel with two channels, in levels from 0 to 255, not rounded."""

    def __init__(self, length):
        super().__init__(length)
        self.points = ((on_the_tree(length, 0) + 1) * 127.5).astype(np.float32)

    def __getitem__(self, index):
        return self.points[index][None, None], 0


class PatchInput(nn.Module):
    """The velocity of a point: a backbone that sees its cell, a head that sees it in its cell."""

    def __init__(self, config):
        super().__init__()
        self.time = TimeEmbedding(WIDTH)
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

    def view(self, x, centre):
        return (x - centre) / (CELL / 2)


class ImageInput(PatchInput):
    """The same, but the head sees the point's place in the plane."""

    def view(self, x, centre):
        return x


class EnlargedImageInput(PatchInput):
    """The same, but in units of half a cell, as PatchInput has it."""

    def view(self, x, centre):
        return x / (CELL / 2)


TRAINING = dict(batch_size=256, micro_batch=256, label_dropout=0.0, time_mean=-1.0)
MODELS = {"toy": {
    name: Model(WIDE.replace(num_classes=1), data=TreeData(100_000), build=build, training=TRAINING)
    for name, build in (("patch", PatchInput), ("image", ImageInput),
                        ("image, enlarged", EnlargedImageInput))}}
MARKS = 2500,
CLAIMS = [Claim(f"a head that sees one patch fits the manifold better than one that sees the {b}",
                "patch", b, ("to_tree", "from_tree"), "Fig. 12", "a picture")
          for b in ("image", "image, enlarged")]


@torch.no_grad()
def draw_points(net, n):
    """n samples of a toy model.  (n, 2)"""
    device = next(net.parameters()).device
    noise = torch.randn(n, 2, 1, 1, generator=random_stream("tree")).to(device)
    points = heun(lambda x, t: net(x, torch.full((n,), t, device=device), None), noise, 50)
    return points.flatten(1).double().cpu().numpy()


def measure(lab, name, model, net):
    points, truth = draw_points(net, POINTS), on_the_tree(20 * POINTS, 1)
    return dict(to_tree=float(cKDTree(truth).query(points)[0].mean()),
                from_tree=float(cKDTree(points).query(truth[:POINTS])[0].mean()))


def draw(results, lab):
    """After Fig. 12: the tree in orange, samples of seed 0 in black."""
    figure, panels = plt.subplots(1, 3, figsize=(10, 3.9), layout="constrained")
    for axes, (name, model) in zip(panels, MODELS["toy"].items()):
        points = draw_points(lab.train(model, 0, MARKS[0])[0], POINTS)
        for segment in np.array(tree()):
            axes.plot(*segment.T, color=COLOURS[4], linewidth=2.5, solid_capstyle="round", zorder=1)
        axes.plot(*points.T, "k.", markersize=0.8, zorder=2)
        ours = list(by_seed(results["rows"], "to_tree", model=name).values())
        axes.set(aspect="equal", xlim=(-1.15, 1.15), ylim=(-1.1, 1.1), xticks=[], yticks=[])
        axes.set_title(f"head sees: {name}\nmean distance to the tree {np.mean(ours):.4f}", size=10)
    return figure
