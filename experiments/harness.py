"""
What the experiments share: train alike, measure alike, write down, judge.

Every model is trained by train.fit from the same images, noise and times in the same order, which
are functions of the seed alone, with the same optimizer; only what an experiment is about differs.
Finished runs stay in --runs under a name made of their settings: experiments share them, and an
interrupted experiment goes on where it was.  The name knows nothing of the code: whoever changes
that deletes the folder.  What is measured, on the averaged weights, needs no download:

    loss       flow matching loss, Eq. (5), on fixed held-out images, times and noise
    loss_by_t  the same in tenths of t
    spectrum   samples against held-out images: mean distance of their radially averaged power
               spectra, in dB;  high: the same over the upper half of the frequencies
    frechet    Frechet distance of samples to held-out images, in 64 features of a small classifier
    named      fraction of the samples which that classifier names as the class asked for
    seam       mean step between neighbouring pixels across patch borders over that inside patches,
               in samples, over the same in held-out images: 1 is right, more is a visible seam
"""

import dataclasses
import hashlib
import importlib
import json
import math
import os
import platform
import re
import statistics
import tempfile
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.utils.data import Subset
from tqdm import tqdm

import fid
from dip import DiP, DiPConfig, cost
from experiments.recognise import as_input, make_classifier, predict, train_classifier
from sample import (at_least, generate, load_checkpoint, option, parse_options, save_atomically,
                    start_processes, to_uint8)
from train import Examples, ShapesData, TrainOptions, fit, mean_losses, open_data, validate

# -------------------------------------------------------------------------------------------------
# What is common to all models, and the two regimes: a token narrower than the 192 values of its
# patch cannot even carry the noise through, a wider one can, as the paper's (1152 > 768)

BASE = DiPConfig(image_size=32, patch_size=8, hidden_size=256, depth=4, num_heads=4, num_classes=10,
                 head_width=16, head_depth=3)
REGIMES = {"narrow": BASE.replace(hidden_size=96), "wide": BASE}
STEPS = 500
TRAINING = dict(batch_size=16, micro_batch=16, lr=3e-3, warmup=50, cooldown=0.3, time_mean=0.0,
                workers=0, keep=1)
SAMPLING = dict(sampler="ab2", steps=20)     # without guidance


@dataclass
class RunOptions:
    """What every experiment can be told."""

    data = num = fid = None                  # but these only some, below
    seeds: int = option(3, "runs of each model, of the seeds 0, 1, ...")
    steps: int | None = option(None, "updates of each model [the experiment's own]")
    runs: str = option("runs/experiments", "folder of the runs", metavar="DIR")
    results: str = option("experiments/results", "folder of the JSON", metavar="DIR")
    pictures: str = option("assets", "folder of the pictures", metavar="DIR")
    device: str = option("auto", "auto, cpu, cuda, mps")
    quick: bool = option(False, "a smoke run of seconds, in a temporary folder")


@dataclass
class DataOptions(RunOptions):
    data: str | None = option(None, "image folder with train/ and val/ [embedded shapes]",
                              metavar="DIR")


@dataclass
class Options(DataOptions):
    num: int = option(300, "samples that are measured, and held-out images they are held against")
    fid: str | None = option(None, "weights of Inception: measure with fid.py too", metavar="FILE")


def changed(options):
    """The data and the options that make other rows than the defaults do, in words."""
    words = [Path(options.data).resolve().name] if options.data else []
    for field in ("steps", "seeds", "num", "size", "regimes"):
        value, default = (getattr(x, field, None) for x in (options, type(options)))
        if isinstance(value, list | tuple):
            value, default = " ".join(value), " ".join(default)
        if value != default and not options.quick:
            words.append(f"{field} {value}")
    return words


def digest(*settings):
    """Ten hexadecimal digits that stand for them."""
    return hashlib.blake2b(json.dumps(settings).encode(), digest_size=5).hexdigest()


# -------------------------------------------------------------------------------------------------
# Measures of images: uint8 (n, H, W, 3)


def power_spectrum(images):
    """Radially averaged power, per pixel and channel, at 1 to H/2 cycles an image.  -> (H/2,)"""
    x = np.asarray(images, dtype=np.float64) / 127.5 - 1
    H, W = x.shape[1:3]
    power = (np.abs(np.fft.fft2(x, axes=(1, 2))) ** 2).mean(axis=(0, 3)) / (H * W)
    down, across = np.fft.fftfreq(H) * H, np.fft.fftfreq(W) * W
    radius = np.hypot(down[:, None], across * H / W).round().astype(int).ravel()
    sums, counts = np.bincount(radius, power.ravel()), np.bincount(radius)
    return sums[1:H // 2 + 1] / counts[1:H // 2 + 1]


def seam_contrast(images, P):
    """Mean |step| between neighbours across patch borders over the mean |step| inside patches."""
    x = np.asarray(images, dtype=np.float64)
    across = inside = 0.0
    for axis in (1, 2):
        steps = np.abs(np.diff(x, axis=axis)).mean(axis=(0, 3 - axis, 3))      # by position
        border = np.arange(1, x.shape[axis]) % P == 0
        across, inside = across + steps[border].mean(), inside + steps[~border].mean()
    return across / inside


def moments(features):
    """mean (d,), covariance (d, d) of features (n, d)"""
    return features.mean(axis=0), np.cov(features, rowvar=False)


@torch.no_grad()
def features(net, images):
    """What the classifier sees: its last maps, averaged.  uint8 (n, H, W, 3) -> (n, 64)"""
    maps = (net[:-3](as_input(part)) for part in np.array_split(images, 10) if len(part))
    return torch.cat([m.mean(dim=(2, 3)) for m in maps]).double().numpy()


def inception_side(net, images, device):
    """The images, seen by Inception: a side of fid.compare."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "images.npz")
        np.savez(path, arr_0=images)
        side = fid.Side(path)
        side.measure(net, 50, device)
    return side


# -------------------------------------------------------------------------------------------------
# The laboratory: data, yardsticks, training


class Cached:
    """A data set whose images are read once."""

    def __init__(self, data):
        self.data, self.read = data, {}

    def __getattr__(self, name):
        return getattr(self.data, name)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        if index not in self.read:
            self.read[index] = self.data[index]
        return self.read[index]


def look_away(*_):
    """No pictures during a training."""


class Lab:
    """What one experiment works with."""

    def __init__(self, options):
        self.options, self.size = options, getattr(options, "size", BASE.image_size)
        self.processes = start_processes(options.device)
        if options.fid:
            self.inception = fid.load_inception(options.fid, any_weights=True)

    @property
    def device(self):
        return self.processes.device

    @property
    def seeds(self):
        return range(self.options.seeds)

    @property
    def path(self):
        """Of the data, for the names of files."""
        return self.options.data and str(Path(self.options.data).resolve())

    def steps(self, default=STEPS):
        """How long to train, unless the command line says otherwise."""
        return 2 if self.options.quick else self.options.steps or default

    @cached_property
    def data(self):
        """(training set, validation set)"""
        data, val_data = open_data(self.options.data, self.size)
        if val_data is None:
            raise ValueError(f"--data {self.options.data} has no val/ with the classes of train/")
        if len(val_data) < (self.options.num or 0):
            raise ValueError(f"--num {self.options.num}: there are only {len(val_data)} held-out "
                             f"images")
        return (data, val_data) if self.options.data is None else (Cached(data), Cached(val_data))

    @cached_property
    def real(self):
        """uint8 (n, H, W, 3): held-out images, in a random order that is always the same."""
        data = self.data[1]
        order = np.random.default_rng(0).permutation(len(data))[:self.options.num]
        return np.stack([data[int(i)][0] for i in order])

    @cached_property
    def classifier(self):
        """(network, its accuracy on held-out images): the eyes of `frechet` and `named`.  It stays
        in --runs: what is compared is judged by the same eyes."""
        training, held_out, steps, classes = *self.data, 600, len(self.data[0].classes)
        if self.options.data is None:                        # drawings that no model has seen
            training, steps = ShapesData(self.size, first=2 * 10**6), 300
            held_out = ShapesData(self.size, 1000, first=3 * 10**6)
        steps = 2 if self.options.quick else steps
        name = digest(self.path, self.size, steps)
        path = Path(self.options.runs, f"classifier-{name}.pt")
        if not path.exists():
            order = np.random.default_rng(1).permutation(len(training)).tolist()
            shuffled = training if self.options.data is None else Subset(training, order)
            net, accuracy = train_classifier(shuffled, held_out, classes, steps)
            save_atomically(path, lambda partial: torch.save(
                dict(net=net.state_dict(), accuracy=accuracy), partial))
        state = torch.load(path, weights_only=True)
        net = make_classifier(classes).eval()
        net.load_state_dict(state["net"])
        return net, state["accuracy"]

    @cached_property
    def yardstick(self):
        """What samples are held against: moments of features, log spectrum, by Inception too."""
        side = None
        if self.options.fid:
            side = inception_side(self.inception[0].to(self.device), self.real, self.device)
        seen = features(self.classifier[0], self.real)
        return moments(seen), np.log10(power_spectrum(self.real)), side

    def folder(self, config, seed, steps, build, data, training):
        """Where a run lives: a name made of its settings."""
        key = digest(dataclasses.asdict(config), seed, steps, build.__name__,
                     data and type(data).__name__, self.path, training, self.device.type)
        name = f"{config.head}-{config.hidden_size}-{build.__name__}-{seed}-{key}"
        return Path(self.options.runs, name)

    def train(self, config, seed, steps=None, build=DiP, data=None, look=look_away, every=None,
              **changes):
        """(averaged model in eval mode, its wall-clock, folder of the run); data, if not the
        experiment's; look and every as --sample-every of train.fit; changes to TRAINING."""
        steps, training = steps or self.steps(), TRAINING | changes
        if self.options.quick:
            training |= dict(batch_size=2, micro_batch=2)
        out = self.folder(config, seed, steps, build, data, training)
        last = out / f"ckpt-{steps:08d}.pt"
        if not last.exists():
            write_json(out / "machine.json", dict(threads=torch.get_num_threads()))
            settings = TrainOptions(
                model=config.head, image_size=config.image_size, steps=steps, seed=seed,
                log_every=50, sample_every=every or steps, save_every=max(1, steps // 2),
                out=str(out), **training)
            fit(settings, config, *((data, None) if data else self.data), self.processes,
                build=build, look=look)
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        logged = [(line["step"], line["images_per_s"]) for line in lines if "images_per_s" in line]
        seconds = sum((step - before) * training["batch_size"] / speed
                      for (before, _), (step, speed) in pairwise([(0, 0), *logged]))
        machine = json.loads((out / "machine.json").read_text())
        model = build(config).to(self.device).eval().requires_grad_(False)
        model.load_state_dict(load_checkpoint(last)["ema"])
        return model, dict(seconds=round(seconds, 1), **machine), out

    def labels(self, num):
        """Classes of `num` samples: i mod K, or evenly spread where there are more classes."""
        K = len(self.data[0].classes)
        return [i % K if K <= num else i * K // num for i in range(num)]

    def sample(self, model, num=None, **settings):
        """uint8 (n, H, W, 3)"""
        num = num or self.options.num
        labels = self.labels(num)
        settings = SAMPLING | settings | ({"steps": 2} if self.options.quick else {})
        parts = [range(start, min(start + 100, num)) for start in range(0, num, 100)]
        return np.concatenate([
            to_uint8(generate(model, [labels[i] for i in part], part, 0, **settings))
            for part in tqdm(parts, "sampling", leave=False)])

    def judge(self, images, P):
        """Every measure of a set of samples."""
        net, (real, spectrum, side) = self.classifier[0], self.yardstick
        decibel = 10 * (np.log10(power_spectrum(images)) - spectrum)
        found = dict(
            frechet=fid.frechet_distance(*real, *moments(features(net, images))),
            named=float((predict(net, images) == self.labels(len(images))).mean()),
            spectrum=float(np.abs(decibel).mean()),
            high=float(np.abs(decibel[len(decibel) // 2:]).mean()),
            seam=float(seam_contrast(images, P) / seam_contrast(self.real, P)),
            decibel=[round(float(x), 3) for x in decibel])
        if side:
            samples = inception_side(self.inception[0].to(self.device), images, self.device)
            found |= fid.compare(side, samples)
        return found

    def once(self, out, name, measure):
        """What measure() finds, kept beside the run that it measures."""
        weights = f"-{self.inception[1][:10]}" if self.options.fid else ""
        path = out / f"measures-{self.options.num}{name}{weights}.json"
        if not path.exists():
            write_json(path, measure())
        return json.loads(path.read_text())

    def row(self, name, config, seed, build=DiP, **fields):
        """Train a model, or find it trained, and measure everything: one row of the results."""
        model, clock, out = self.train(config, seed, build=build)

        def measure():
            tally = validate(model, Examples(self.data[1], 0, "val"), self.device,
                             limit=20 if self.options.quick else 500)
            parameters, flops = cost(config)
            return dict(parameters=parameters, gflops=flops / 1e9, **mean_losses(tally),
                        **self.judge(self.sample(model), config.patch_size))

        row = dict(model=name, seed=seed, **(fields | self.once(out, "", measure)), **clock)
        print(f"{name}, seed {seed}: " + ", ".join(
            f"{key} {x:.4g}" for key, x in row.items() if isinstance(x, float)), flush=True)
        return row

    def rows(self, models, build=DiP, **fields):
        """A row of every model {name: configuration} with every seed."""
        classes = len(self.data[0].classes)
        return [self.row(name, config.replace(image_size=self.size, num_classes=classes), seed,
                         build, **fields)
                for seed in self.seeds for name, config in models.items()]

    def rows_of_regimes(self, models):
        """The same in each regime; models {name: changes to its configuration}."""
        rows = []
        for regime, base in REGIMES.items():
            rows += self.rows({name: base.replace(**changes) for name, changes in models.items()},
                              regime=regime)
        return rows

    def calibrate(self):
        """Measures of further held-out images, as if they were samples: what is perfect here."""
        data = self.data[1]
        order = np.random.default_rng(0).permutation(len(data))[self.options.num:]
        rest = [data[int(i)][0] for i in order[:self.options.num]]
        found = self.judge(np.stack(rest), BASE.patch_size) if len(rest) > 100 else {}
        return dict(n=len(rest), **{key: found[key] for key in ("frechet", "spectrum", "high")
                                    if found})


# -------------------------------------------------------------------------------------------------
# Verdicts


@dataclass
class Claim:
    """A row of the table: what is claimed, of which of our models and images, where in the paper,
    the figure there, ours, and the verdict."""

    claim: str
    models: str
    source: str
    paper: str
    ours: str
    verdict: str


SEEN, UNCLEAR, NOT_SEEN, NOT_RUN = "seen", "unclear", "not seen at this scale", "not run"
LABELS = {"frechet": "FD", "psnr": "PSNR", "probe": "accuracy", "memory_mib": "MiB",
          "to_tree": "to the manifold", "from_tree": "from it", "detail": "error of detail"}
MORE_IS_BETTER = {"psnr", "probe", "silhouette"}


def numbers_of(rows, measure, **where):
    """A measure of all rows that agree with `where`, in the order of the seeds."""
    found = [row for row in rows if all(row[key] == x for key, x in where.items())]
    return [row[measure] for row in sorted(found, key=lambda row: row["seed"])]


def told(numbers):
    """Mean and standard deviation of figures, one a seed, to the digits that mean something."""
    if not numbers:
        return NOT_RUN
    mean, spread = statistics.mean(numbers), statistics.stdev(numbers) if numbers[1:] else 0
    digits = max(0, 2 - math.floor(math.log10(abs(mean) or 1))) if math.isfinite(mean) else 0
    return f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if numbers[1:] else "")


def smaller(a, b):
    """Verdict on "a is smaller than b", given a figure a seed of each: by chance alone, three
    against three are separated in the direction claimed in one case of twenty."""
    if min(len(a), len(b)) < 3:
        return UNCLEAR
    if max(a) < min(b):
        return SEEN
    return NOT_SEEN if min(a) > max(b) else UNCLEAR


def agree(verdicts):
    """Verdict by several measures of one thing: unclear unless all of them say the same."""
    return verdicts[0] if len(set(verdicts)) == 1 else UNCLEAR


def all_of(verdicts):
    """Verdict on a claim of several parts: seen if all parts are, not seen if one is not."""
    return next((word for word in (NOT_SEEN, UNCLEAR) if word in verdicts), SEEN)


def better(rows, a, b, measures=("frechet", "loss"), **where):
    """(ours, verdict) of the claim that model a is better than each of the models b.  Ours has in
    brackets how many pairs of one seed, which share images, noise and times, say so."""
    others, text = b if isinstance(b, tuple) else (b,), []
    verdicts = {other: [] for other in others}
    for measure in measures:
        mine, found = numbers_of(rows, measure, model=a, **where), []
        for other in others:
            theirs = numbers_of(rows, measure, model=other, **where)
            low, high = (theirs, mine) if measure in MORE_IS_BETTER else (mine, theirs)
            wins = sum(x < y for x, y in zip(low, high))
            found.append(f"{told(theirs)} ({wins}/{len(theirs)})")
            verdicts[other].append(smaller(low, high))
        text.append(f"{LABELS.get(measure, measure)} {told(mine)} against {', '.join(found)}")
    return "; ".join(text), all_of([agree(found) for found in verdicts.values()])


def hardware(device):
    """The processor, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", path.read_text()) if path.exists() else None
    return f"{found[1] if found else platform.machine()}, {os.cpu_count()} cores"


def write_json(path, content):
    text = json.dumps(content, indent=1)
    text = re.sub(r"\[[^\[\]{}]*\]", lambda m: re.sub(r"\s+", " ", m[0]), text)  # lists on one line
    save_atomically(path, lambda partial: partial.write_text(text + "\n"))


# -------------------------------------------------------------------------------------------------
# Pictures

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555",
           "#999933")
AXES = {"frechet": "Fréchet distance", "loss": "flow matching loss",
        "high": "error of high frequencies, dB"}


def title_of(regime):
    return f"{regime} tokens" if regime in REGIMES else f"models of size {regime}"


def draw_dots(results, strips=None):
    """A dot a seed: a row of panels a regime, a panel a measure, a line a model.  Below, if given,
    strips {title: {model: uint8 (n, H, W, 3)}} of samples."""
    rows, measures = results["rows"], ("loss", "frechet", "high")
    regimes = list(dict.fromkeys(row.get("regime") for row in rows))
    names = list(dict.fromkeys(row["model"] for row in rows))
    height = 0.27 * len(names) + 0.9
    tall = sum(0.52 * len(strip) + 0.4 for strip in (strips or {}).values())
    whole = plt.figure(figsize=(9, height * len(regimes) + tall), layout="constrained")
    upper, *lower = whole.subfigures(1 + bool(strips), 1, squeeze=False, height_ratios=[
        height * len(regimes), *([tall] if strips else [])])[:, 0]
    panels = upper.subplots(len(regimes), len(measures), squeeze=False, sharey=True)
    for line, regime in zip(panels, regimes):
        for axes, measure in zip(line, measures):
            for place, name in enumerate(names):
                found = [row[measure] for row in rows
                         if (row["model"], row.get("regime")) == (name, regime)]
                colour = COLOURS[place % len(COLOURS)]
                axes.plot(found, [place] * len(found), "o", color=colour, alpha=0.7, markersize=5)
            axes.grid(alpha=0.3)
            axes.set(ylim=(len(names) - 0.5, -0.5))
            axes.set_yticks(range(len(names)), names)
        if regime:
            line[0].set_title(title_of(regime), loc="left", size=10)
    for axes, measure in zip(panels[-1], measures):
        axes.set_xlabel(AXES[measure])
    if strips:
        draw_strips(lower[0], strips)
    return whole


def draw_strips(figure, strips):
    """Rows of samples, a model each, under a title for each group."""
    groups = figure.subfigures(len(strips), 1, squeeze=False, height_ratios=[
        0.52 * len(strip) + 0.4 for strip in strips.values()])[:, 0]
    for group, (title, strip) in zip(groups, strips.items()):
        group.suptitle(title, size=10)
        panels = group.subplots(len(strip), 1, squeeze=False)[:, 0]
        for axes, (name, images) in zip(panels, strip.items()):
            wide = np.pad(images, ((0, 0), (0, 0), (1, 1), (0, 0)), constant_values=255)
            axes.imshow(np.concatenate(list(wide), axis=1), interpolation="nearest")
            axes.set_axis_off()
            axes.text(-6, images.shape[1] / 2, name, ha="right", va="center", size=9)


# -------------------------------------------------------------------------------------------------
# The course of an experiment


def conduct(name, argv=None, folder=None):
    """Run experiments/<name>.py, which has measure(lab) -> dict with "rows", claims(results) ->
    [Claim], and draw(results, lab) -> figure; writes its JSON and its PNG.  A quick run writes
    below `folder`, or nowhere."""
    module = importlib.import_module(f"experiments.{name}")
    options = parse_options(getattr(module, "Options", Options), module.__doc__, argv)
    at_least(1, seeds=options.seeds, steps=1 if options.steps is None else options.steps)
    if options.num is not None:
        at_least(20, num=options.num)
    with tempfile.TemporaryDirectory() as scratch:
        if options.quick:
            options.seeds, options.num = 1, options.num and 20
            options.runs = options.results = options.pictures = folder or scratch
        lab, words, steps = Lab(options), changed(options), getattr(module, "STEPS", STEPS)
        setting = words if options.data else [getattr(module, "DATA", "shapes"), *words]
        if steps != STEPS and not options.steps:
            setting = [*setting, f"steps {steps}"]
        results = dict(
            experiment=name, setting=", ".join(setting), seeds=list(lab.seeds), num=options.num,
            steps=lab.steps(steps), size=lab.size, training=TRAINING, sampling=SAMPLING,
            hardware=hardware(lab.device), torch=torch.__version__)
        if options.fid:
            results["inception"] = lab.inception[1]
        results |= module.measure(lab)
        if "frechet" in results["rows"][0]:
            results["classifier_accuracy"] = lab.classifier[1]
        file = re.sub(r"\W+", "-", "-".join([name, *words]))
        path, picture = Path(options.results, f"{file}.json"), Path(options.pictures, f"{file}.png")
        write_json(path, results)
        results = json.loads(path.read_text())
        for claim in module.claims(results):
            print(f"{claim.claim} ({claim.models}): {claim.ours}: {claim.verdict}")
        plt.switch_backend("Agg")
        figure = module.draw(results, lab)
        save_atomically(picture, lambda partial: figure.savefig(partial, format="png", dpi=120))
        plt.close(figure)
        print(f"{name}: wrote {path} and {picture}", flush=True)
