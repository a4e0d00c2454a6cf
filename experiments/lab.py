"""
The laboratory: models are trained alike and measured alike.

Models that are compared see the same images, times and noise, which depend on the seed alone, and
differ in what the experiment names and in their learning rate.  That is constant, so that a
training of 2000 steps passes through that of 500: both are one folder of --runs, named after the
model's settings, which every experiment that needs it shares.  The name knows nothing of the code:
whoever changes that deletes the folder.

Of the averaged weights (over about the last tenth of the steps) are measured:

    loss       flow matching loss, Eq. (5), of 500 held-out images with fixed times and noise
    loss_by_t  the same in tenths of t
    detail     the loss of those images whose t is below 0.3, about a fifth of them
    frechet    Frechet distance of 1000 samples, half of them from each of two sampling seeds, to
               held-out images, in 64 features of a small classifier
    named      fraction of the samples that the classifier names as the class asked for
    high       mean distance of the samples' power spectrum from that of held-out images, in its
               upper half of the frequencies, in dB
    seam       distance from 1 of the mean step between neighbouring pixels across patch borders
               over that inside patches, in samples, over the same in held-out images
"""

import copy
import dataclasses
import json
import os
import platform
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Subset

import fid
from common import load_checkpoint, locked, option, progress, save_atomically, start_processes
from dataset import Examples, FolderData, ShapesData, open_data
from dip import DiP, cost
from experiments.measures import (make_classifier, moments, power_spectrum, predict, seam_contrast,
                                  train_classifier)
from experiments.models import TRAINING, WIDE, marks_of
from experiments.report import write_json
from sample import generate, to_uint8
from train import TrainOptions, fit, mean_losses, validate

SAMPLING = dict(sampler="ab2", steps=12)     # without guidance
SNAPSHOT = 500                               # steps between the weights that are kept


@dataclass
class Options:
    """What every experiment can be told."""

    photos: str | None = option(None, "image folder with train/ and val/, for models of photos "
                                      "[their rows stay as they are]", metavar="DIR")
    seeds: int = option(3, "trainings of each model, of the seeds 0, 1, ...")
    num: int = option(1000, "samples that are measured")
    runs: str = option("experiments/runs", "folder of the trainings", metavar="DIR")
    device: str = option("auto", "auto, cpu, cuda, mps")
    compile: bool = option(False, "torch.compile, block by block")
    quick: bool = option(False, "a smoke run, which writes nothing")
    readme: bool = option(False, "write the tables into experiments/README.md")


class InMemory(FolderData):
    """An image folder that is read once."""

    def __init__(self, data):
        self.__dict__.update(data.__dict__, images=[data[i] for i in range(len(data))])

    def __getitem__(self, index):
        return self.images[index]


def hardware(device):
    """The processor, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", path.read_text()) if path.exists() else None
    return f"{found[1] if found else platform.machine()}, {os.cpu_count()} cores"


class Lab:
    """Trains and measures models; every result stays in --runs beside the weights."""

    def __init__(self, options):
        self.options, self.quick = options, options.quick
        self.processes = start_processes(options.device)
        self.made = dict(num=options.num, hardware=hardware(self.processes.device),
                         torch=torch.__version__, compiled=options.compile)
        # each is computed once for all models that need it
        self.data, self.eyes, self.cost = cache(self.data), cache(self.eyes), cache(cost)

    def data(self, name, size):
        """(training set, validation set) of "shapes" or "photos"."""
        if name == "shapes" or self.quick:
            return open_data(None, size)
        if not self.options.photos:
            raise ValueError("models of photos need --photos DIR")
        training, validation = open_data(self.options.photos, size)
        if validation is None or len(training.classes) != WIDE.num_classes:
            raise ValueError(f"--photos {self.options.photos} must have train/ and val/ of "
                             f"{WIDE.num_classes} classes")
        return InMemory(training), InMemory(validation)

    def named(self, data):
        """The data set in the names of files."""
        photos = data == "photos" and self.options.photos
        return Path(photos).resolve().name if photos else data

    def eyes(self, name, size):
        """Judges of samples: (classifier, its accuracy, held-out images, their moments)."""
        training, validation = self.data(name, size)
        count, file = len(training.classes), f"classifier-{self.named(name)}-{size}.pt"
        path = Path(self.options.runs, file)
        if not path.exists():
            order = np.random.default_rng(1).permutation(len(training)).tolist()
            shuffled, held_out, steps = Subset(training, order), validation, 600
            if isinstance(validation, ShapesData):           # drawings that no model has seen
                shuffled, steps = ShapesData(size, first=2 * 10**6), 300
                held_out = ShapesData(size, 1000, first=3 * 10**6)
            net = train_classifier(shuffled, count, 2 if self.quick else steps)
            images, labels = zip(*(held_out[i] for i in range(len(held_out))))
            accuracy = float((predict(net, np.stack(images)) == labels).mean())
            save_atomically(path, lambda partial: torch.save(
                dict(net=net.state_dict(), accuracy=accuracy), partial))
        state = torch.load(path, weights_only=True)
        net = make_classifier(count).eval()
        net.load_state_dict(state["net"])
        images = [validation[i][0] for i in range(50 if self.quick else len(validation))]
        return net, state["accuracy"], np.stack(images), moments(net, np.stack(images))

    def train(self, model, seed, steps):
        """The averaged model after some steps, trained if it is not there, and its folder."""
        if self.quick:
            model, steps = dataclasses.replace(model, config=model.config.replace(depth=2)), 2
        words = self.named(model.data_name), self.processes.device.type, model.digest(), seed
        out = Path(self.options.runs, "-".join([model.config.head, *map(str, words)]))
        path = out / f"ema-{steps}.pt"
        if not path.exists():
            self.fit(model, seed, steps, out)
        net = model.build(model.config).to(self.processes.device).eval().requires_grad_(False)
        net.load_state_dict(torch.load(path, weights_only=True, map_location=self.processes.device))
        return net, out

    def fit(self, model, seed, steps, out):
        """Train, and keep the averaged weights every SNAPSHOT steps."""
        def save(step, weights):
            save_atomically(out / f"ema-{step}.pt", lambda path: torch.save(weights, path))

        finished = out / f"ckpt-{steps:08d}.pt"
        if finished.exists():                                # killed before its weights were kept
            return save(steps, load_checkpoint(finished)["ema"])
        config, encoder, data = model.config, None, (model.data, None)
        if isinstance(model.data, str):
            data = self.data(model.data, config.image_size)
        if model.token_loss:     # three of its four layers, of four modules each: (B, 64, H/8, W/8)
            net = copy.deepcopy(self.eyes(model.data, config.image_size)[0][:12])
            net = net.to(self.processes.device)
            encoder = torch.no_grad()(lambda x: net(x.to(memory_format=torch.channels_last)))
        settings = dict(TRAINING, compile=self.options.compile) | model.training
        if self.quick:
            settings |= dict(batch_size=2, micro_batch=2, compile=False)
        torch.compiler.reset()
        with locked(out, wait=True):
            if (out / f"ema-{steps}.pt").exists():           # by another command, meanwhile
                return
            fit(TrainOptions(image_size=config.image_size, steps=steps, seed=seed, lr=model.lr,
                             sample_every=SNAPSHOT, save_every=SNAPSHOT, out=str(out), **settings),
                config, *data, self.processes, encoder, build=model.build,
                look=lambda out, step, ema, *_: save(step, ema.state_dict()))

    def sample(self, net, num, seed=0, **settings):
        """Samples i = 0 ... num - 1 of class i mod K.  -> uint8 (num, H, W, 3)"""
        settings = SAMPLING | settings | (dict(steps=2) if self.quick else {})
        K, parts = net.config.num_classes, [range(i, min(i + 50, num)) for i in range(0, num, 50)]
        return np.concatenate([
            to_uint8(generate(net, [i % K for i in part], part, seed, **settings))
            for part in progress(parts, "sampling", leave=False)])

    def losses(self, model, net):
        """Of held-out images."""
        data = self.data(model.data, model.config.image_size)[1]
        sums = validate(net, Examples(data, 0, "val"), self.processes.device,
                        limit=10 if self.quick else 500)
        return dict(**mean_losses(sums), detail=(sums[0, :3].sum() / sums[2, :3].sum()).item())

    def judge(self, model, images):
        """Every measure of samples, of class i mod K in turn."""
        net, _, real, statistics = self.eyes(model.data, model.config.image_size)
        found = power_spectrum(images) / power_spectrum(real)
        P, asked = model.config.patch_size, np.arange(len(images)) % model.config.num_classes
        return dict(
            frechet=fid.frechet_distance(*statistics, *moments(net, images)),
            named=float((predict(net, images) == asked).mean()),
            high=float(np.abs(10 * np.log10(found))[len(found) // 2:].mean()),
            seam=float(abs(seam_contrast(images, P) / seam_contrast(real, P) - 1)))

    def samples(self, net, **settings):
        """--num samples for judge(), half of them from each of two seeds."""
        half = self.options.num // 2
        half -= half % net.config.num_classes                # i mod K in both
        return np.concatenate([self.sample(net, half, seed, **settings) for seed in (0, 1)])

    def once(self, path, measure):
        """What measure() finds, and on which machine, kept in a file."""
        if not path.exists():
            write_json(path, measure() | self.made)
        return json.loads(path.read_text())

    def row(self, experiment, name, model, seed, steps):
        """Train a model and measure it, as the experiment does if it has a measure() of its own; a
        loss of None where the training diverged."""
        try:
            net, out = self.train(model, seed, steps)
        except FloatingPointError:
            return dict(loss=None)
        if hasattr(experiment, "measure"):
            path = out / f"{experiment.__name__}-{name}-{steps}-{self.options.num}.json"
            return self.once(path, lambda: experiment.measure(self, name, model, net))
        row = self.once(out / f"losses-{steps}.json", lambda: self.losses(model, net))
        if steps == marks_of(experiment)[-1] and getattr(experiment, "SAMPLED", True):
            row |= self.once(out / f"samples-{steps}-{self.options.num}.json",
                             lambda: self.judge(model, self.samples(net)))
        return row

    def calibrate(self, experiment):
        """Of the judges: accuracy, and the distance of training images to held-out ones."""
        found = {}
        for data, size in sorted({(model.data, model.config.image_size)
                                  for *_, model, _ in self.runs(experiment)}):
            images, (net, accuracy, _, real) = self.data(data, size)[0], self.eyes(data, size)
            order = np.random.default_rng(2).permutation(len(images))[:self.options.num]
            statistics = moments(net, np.stack([images[int(i)][0] for i in order]))
            found[f"{data}, {size}"] = dict(accuracy=accuracy, frechet=fid.frechet_distance(
                *real, *statistics))
        return found

    def runs(self, experiment):
        """(group, model's name, Model, seed) of an experiment, seed by seed.  Models of photos are
        left out where there are no photos."""
        for seed in getattr(experiment, "SEEDS", range(self.options.seeds)):
            for group, models in experiment.MODELS.items():
                for name, model in models.items():
                    if self.options.photos or self.quick or model.data != "photos":
                        yield group, name, model, seed

    def rows(self, experiment):
        """A row for every model, seed and number of steps; samples after the last step only."""
        for group, name, model, seed in self.runs(experiment):
            size = {}
            if issubclass(model.build, DiP) and not self.quick:
                parameters, flops = self.cost(model.config, model.build)
                size = dict(parameters=parameters, gflops=round(flops / 1e9, 4))
            for steps in marks_of(experiment):
                row = self.row(experiment, name, model, seed, steps)
                print(f"{group}: {name}, seed {seed}, {steps} steps: " + ", ".join(
                    f"{key} {x}" for key, x in row.items()
                    if key not in self.made and not isinstance(x, list)), flush=True)
                yield dict(group=group, model=name, seed=seed, steps=steps, lr=model.lr, **size,
                           **self.made | row)
