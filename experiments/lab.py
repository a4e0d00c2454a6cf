"""
The laboratory trains and measures all models in the same way.

Models that are compared see the same images, times and noise, which depend on the seed alone.  The
learning rate is constant unless the model says otherwise, so a run of 2000 steps begins with the
run of 500.  We measure the EMA weights (an average over about the last tenth of the training):

    loss        flow matching loss, Eq. (5), of 500 held-out images with fixed times and noise
    loss_by_t   the same, per tenth of t
    detail      the loss of those images whose t is below 0.3, about a fifth of them
    frechet     Frechet distance of 1000 samples, half of them from each of two sampling seeds, to
                held-out images, in 64 features of a small classifier, the judge
    recognised  fraction of the samples that the judge assigns to the requested class
    seam        |c(samples) / c(held-out images) - 1|, where c is the mean |step| between
                neighbouring pixels across patch borders over that inside patches
"""

import math
import platform
import re
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import Subset, default_collate
from tqdm import tqdm

import train
from dip import DiP, DiPConfig
from experiments.report import RATE_SEED, SEEDS, find, rates_of
from experiments.speed import cost
from fid import frechet_distance
from sample import find_checkpoint, generate, load_model, locked, start_processes, to_uint8

TRAINING = dict(batch_size=16, micro_batch=16, warmup=50, cooldown=0.0, time_mean=0.0, workers=0,
                sample_every=0, save_every=500, keep=1, log_every=100)
SAMPLING = dict(sampler="ab2", steps=12)     # without guidance
RATES = 3e-3, 6e-3, 1.2e-2                   # tried for models that have none


@dataclass(frozen=True)
class Model:
    """All that a row of results depends on, except its seed."""

    config: DiPConfig
    lr: float | None = 3e-3                  # None: tuned on seed 9
    data: object = "shapes"                  # or "photos", or a data set like train.Shapes
    build: object = DiP                      # makes the network from the configuration
    training: dict = field(default_factory=dict)             # changes to TRAINING
    steps: tuple = (500,)                    # after which it is measured
    measure: object = None                   # measure(lab, model, net); None: losses and samples


class Drawn:
    """A data set of one class, whose image k is draw(k)."""

    classes, names, flip = ["-"], ["-"], False

    def __init__(self, length, draw):
        self.length, self.draw = length, draw

    def __len__(self):
        return self.length

    def __getitem__(self, k):
        return self.draw(k), 0


def seam_contrast(images, P):
    """Mean |step| between neighbours across patch borders over the mean |step| inside patches."""
    x = np.asarray(images, dtype=np.float64)
    across = inside = 0.0
    for axis in (1, 2):
        steps = np.abs(np.diff(x, axis=axis)).mean(axis=(0, 3 - axis, 3))      # by position
        border = np.arange(1, x.shape[axis]) % P == 0
        across, inside = across + steps[border].mean(), inside + steps[~border].mean()
    return across / inside


class Judge:
    """A small classifier, trained on images with a little noise, so that exact pixel values do not
    matter."""

    def __init__(self, training, validation, steps):
        widths, layers = [3, 16, 32, 64, 64], []
        torch.manual_seed(0)
        for i, o in zip(widths, widths[1:]):
            layers += [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(4 * 64, 10)]
        self.net = nn.Sequential(*layers).to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(self.net.parameters(), 2e-3)
        for step in tqdm(range(steps), "training the judge"):
            pixels, y = default_collate([training[k % len(training)]
                                         for k in range(64 * step, 64 * step + 64)])
            x = train.to_model(pixels, "cpu")
            x = x + 0.1 * torch.rand(()) * torch.randn_like(x)
            F.cross_entropy(self.net(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        self.net.eval()
        self.real, labels = (x.numpy() for x in default_collate(validation))
        classes, self.moments = self.predict(self.real)
        self.accuracy = float((classes == labels).mean())

    @torch.no_grad()
    def predict(self, images):
        """uint8 (n, H, W, 3) -> classes (n,), (mean (64,), covariance (64, 64)) of the last feature
        maps, averaged over the image"""
        maps = torch.cat([self.net[:-3](train.to_model(torch.from_numpy(part), "cpu"))
                          for part in np.array_split(images, 10)])
        features = maps.mean(dim=(2, 3)).double().numpy()
        return (self.net[-3:](maps).argmax(1).numpy(),
                (features.mean(axis=0), np.cov(features, rowvar=False)))

    def measure(self, images, P):
        """All measures of samples; sample i was requested as class i mod 10."""
        classes, moments = self.predict(images)
        return dict(frechet=frechet_distance(*self.moments, *moments),
                    recognised=float((classes == np.arange(len(images)) % 10).mean()),
                    seam=float(abs(seam_contrast(images, P) / seam_contrast(self.real, P) - 1)))


def next_rate(tried):
    """The rate to try after {rate: loss}, or None.  First all of RATES; then, if the best is at an
    edge, one beyond it."""
    for lr in RATES:
        if lr not in tried:
            return lr
    best = min(tried, key=tried.get)
    beyond = {min(RATES): best / 2, max(RATES): 2 * best}.get(best)
    return None if beyond in tried else beyond


class Lab:
    """Trains and measures the models of an experiment that have no row yet."""

    def __init__(self, options):
        self.options, self.quick = options, options.quick
        self.device = start_processes(options.device)
        # each data set is opened, and each judge trained, once
        self.data, self.judge = cache(self.data), cache(self.judge)

    def data(self, name, size):
        """(training set, validation set) of "shapes" or "photos"."""
        photos = self.options.photos if name == "photos" and not self.quick else None
        sets = train.open_data(photos, size)
        if sets[1] is None or len(sets[0].classes) != 10:
            raise ValueError(f"--photos {photos} must have train/ and val/ of 10 classes")
        return sets

    def judge(self, name, size):
        training, validation = self.data(name, size)
        if name == "photos" and not self.quick:              # the files are sorted by class
            order = np.random.default_rng(1).permutation(len(training)).tolist()
            training, steps = Subset(training, order), 600
        else:                                                # drawings that no model has seen
            training, steps = train.Shapes(size, first=2 * 10**6), 2 if self.quick else 300
        count = 50 if self.quick else len(validation)
        return Judge(training, [validation[k] for k in range(count)], steps)

    def train(self, model, out, seed, steps):
        """Train for so many steps and return the EMA network.  Resumes a stopped or shorter run."""
        config, data = model.config, model.data
        if isinstance(data, str):
            data = self.data(data, config.image_size)[0]
        options = train.parse([])
        vars(options).update(TRAINING | model.training | dict(
            steps=steps, seed=seed, lr=model.lr, out=str(out), compile=self.options.compile))
        if self.quick:
            config = config.replace(depth=2, hidden_size=48, num_heads=3)
            vars(options).update(warmup=0, batch_size=2, micro_batch=2)
        torch.manual_seed(seed)
        net = model.build(config).to(self.device)
        with locked(out):
            return train.fit(net, options, data)[0]

    def sample(self, net, n, seed=0, **settings):
        """Samples i = 0 ... n - 1 of class i mod K.  -> uint8 (n, H, W, 3)"""
        settings = SAMPLING | settings | (dict(steps=2) if self.quick else {})
        parts = np.split(np.arange(n), range(50, n, 50))
        return np.concatenate([
            to_uint8(generate(net, part % net.config.num_classes, part, seed, **settings))
            for part in tqdm(parts, "sampling", leave=False)])

    def judge_samples(self, model, net, **settings):
        """The measures of 1000 samples; half of them are from each of two seeds."""
        half = 10 if self.quick else 500
        images = [self.sample(net, half, seed, **settings) for seed in (0, 1)]
        judge = self.judge(model.data, model.config.image_size)
        return judge.measure(np.concatenate(images), model.config.patch_size)

    def measure(self, given):
        """All measures of a checkpoint that was trained on the drawn shapes."""
        path = find_checkpoint(given)
        net, info = load_model(path, self.device)
        if info["classes"] != train.Shapes.classes:
            raise ValueError(f"{path} was not trained on the drawn shapes")
        model = Model(net.config)
        return path, self.losses(model, net) | self.judge_samples(model, net)

    def losses(self, model, net):
        """Losses of held-out images, and the size of the network."""
        held_out = self.data(model.data, model.config.image_size)[1]
        sums = train.validate(net, held_out, limit=10 if self.quick else 500)    # by tenths of t
        parameters, flops = (0, 0) if self.quick else cost(net.config, model.build)
        return dict(**train.mean_losses(sums), parameters=parameters, gflops=flops / 1e9,
                    detail=(sums[0, :3].sum() / sums[2, :3].sum()).item())

    def row(self, experiment, group, name, model, seed, steps):
        """Train and measure.  The loss is None if the training diverged."""
        machine = f"{platform.processor() or platform.machine()}, torch {torch.__version__}"
        row = dict(group=group, model=name, machine=machine, seed=seed, steps=steps, lr=model.lr)
        words = re.findall(r"[\w.]+", f"{experiment} {group} {name} {model.lr} {seed}")
        out = Path(self.options.runs, "-".join(words))
        try:
            net = self.train(model, out, seed, 2 if self.quick else steps)
        except FloatingPointError:
            return row | dict(loss=None)
        if model.measure:
            return row | model.measure(self, model, net)
        row |= self.losses(model, net)
        if seed != RATE_SEED and (steps >= 2000 or steps == model.steps[-1]):
            row |= self.judge_samples(model, net)
        return row

    def missing(self, experiment, groups, rows):
        """Yields the rows that an experiment lacks.  A model without a learning rate gets the best
        one on seed 9.  Models of photos are left out without --photos."""
        models = [(group, name, model) for group, of_group in groups.items()
                  for name, model in of_group.items()
                  if model.data != "photos" or self.options.photos]
        if self.quick:                       # the first group, at any rate, after the last step
            models = [(group, name, replace(model, lr=model.lr or 3e-3, steps=model.steps[-1:]))
                      for group, name, model in models if group == models[0][0]]
        for seed in SEEDS[:1] if self.quick else SEEDS:
            for group, name, model in models:
                if model.lr is None:
                    tried = rates_of(rows, group, name)
                    while lr := next_rate(tried):
                        row = self.row(experiment, group, name, replace(model, lr=lr), RATE_SEED,
                                       steps=1000)
                        tried[lr] = row["loss"] or math.inf
                        yield row
                    model = replace(model, lr=min(tried, key=tried.get))
                for steps in model.steps:
                    if not find(rows, group=group, model=name, seed=seed, steps=steps):
                        yield self.row(experiment, group, name, model, seed, steps)
