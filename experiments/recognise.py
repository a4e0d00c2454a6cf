"""
Can the ten embedded classes be told apart in a model's samples?

    python -m experiments.recognise     # newest run under runs/, 500 samples

A small convolutional classifier is trained on embedded images, checked on held-out ones, and then
asked to name the samples.  Prints the share named as the class that was asked for, and the shares
whose shape and whose texture are right: the first is global structure, the second local detail.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from common import (at_least, find_checkpoint, load_model, option, parse_options, run_main,
                    start_processes)
from dataset import ShapesData
from sample import SAMPLERS, SampleOptions, generate, to_uint8


def as_input(images):
    """uint8 (B, H, W, 3) -> float (B, 3, H, W) in [-1, 1]"""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def make_classifier(classes=10):
    """A four-layer CNN, untrained."""
    widths = [3, 16, 32, 64, 64]
    layers = []
    for i, o in zip(widths, widths[1:]):
        layers += [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(2), nn.Flatten(),
                         nn.Linear(4 * 64, classes)).to(memory_format=torch.channels_last)


def train_classifier(data, held_out, classes=10, steps=300, batch=64, seed=0):
    """The CNN, trained on images with a little noise on them, so that it does not hang on
    pixel-perfect edges.  Returns (classifier, accuracy on the held-out images)."""
    torch.manual_seed(seed)
    net = make_classifier(classes)
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3)
    for step in tqdm(range(steps), "classifier", unit="step"):
        indices = range(step * batch, (step + 1) * batch)
        images, labels = zip(*(data[i % len(data)] for i in indices))
        x = as_input(np.stack(images))
        x = x + 0.1 * torch.rand(()) * torch.randn_like(x)
        loss = F.cross_entropy(net(x), torch.tensor(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
    net.eval()
    images, truth = zip(*(held_out[i] for i in range(len(held_out))))
    return net, float((predict(net, np.stack(images)) == np.array(truth)).mean())


@torch.no_grad()
def predict(net, images):
    """uint8 (B, H, W, 3) -> class indices (B,)"""
    return np.concatenate(
        [net(as_input(part)).argmax(1).numpy() for part in np.array_split(images, 10)]
    )


@dataclass
class Options:
    ckpt: str | None = option(None, "checkpoint [newest under runs/]", metavar="PATH")
    num: int = option(500, "samples, label i mod 10")
    sampler: str = option("euler", "integrator", choices=tuple(SAMPLERS))
    steps: int = option(100, "steps")
    cfg: float = option(SampleOptions.cfg, "guidance scale")
    seed: int = option(0, "of the samples and of the classifier")


def main():
    options = parse_options(Options, __doc__)
    at_least(10, num=options.num)
    at_least(1, steps=options.steps)
    device = start_processes().device
    path = find_checkpoint(options.ckpt)
    model, state = load_model(path, device)
    if state["classes"] != ShapesData.classes:
        raise ValueError(f"{path} was not trained on the embedded shapes")
    size = model.config.image_size
    net, held_out = train_classifier(ShapesData(size, first=2 * 10**6),
                                     ShapesData(size, 1000, first=3 * 10**6), seed=options.seed)
    labels, images = np.arange(options.num) % 10, []
    for part in tqdm(np.array_split(labels, max(1, options.num // 50)), "sampling", unit="batch"):
        start = sum(map(len, images))
        x = generate(model, part.tolist(), range(start, start + len(part)), options.seed,
                     sampler=options.sampler, steps=options.steps, cfg=options.cfg,
                     interval=SampleOptions.interval)
        images.append(to_uint8(x))
    named = predict(net, np.concatenate(images))
    pairs = ShapesData.pairs
    shape = np.mean([pairs[a][0] == pairs[b][0] for a, b in zip(named, labels)])
    texture = np.mean([pairs[a][1] == pairs[b][1] for a, b in zip(named, labels)])
    print(f"{path}, step {state['step']}; {options.sampler}, {options.steps} steps, "
          f"cfg {options.cfg}, seed {options.seed}, n = {options.num}")
    print(f"classifier on 1000 held-out drawings: {held_out:.1%}")
    print(f"samples named as the class asked for: {(named == labels).mean():.1%} "
          f"(shape {shape:.1%}, texture {texture:.1%})")
    for c, name in enumerate(ShapesData.names):
        print(f"    {name:<16} {(named[labels == c] == c).mean():6.1%}")


if __name__ == "__main__":
    run_main(main)
