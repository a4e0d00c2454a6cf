"""
What the Patch Detailer Head costs: forwards of two presets, side by side in one run.

    python -m experiments.speed     # DiP-XL/16 against DiT-XL/16, one image
    python -m experiments.speed --presets DiT-XL/16 DiP-XL/16-attention --batch 4 --train
    python -m experiments.speed --presets DiP-B/16 DiP-B/16 --batch 4 --train --grad-checkpoint

The two models take turns, so that whatever else the machine does touches both; the ratio is that
of the median times.  Peak memory is that of a fresh process (CPU) or of the allocator (CUDA), and
counts the weights.  Weights are random: they cost the same.
"""

import multiprocessing
import re
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from dip import PRESETS, DiP, check_choice, flow_matching_loss
from sample import (Processes, at_least, autocast, option, parse_options, run_main,
                    start_processes)
from train import TrainOptions
from train import prepare as prepare_model


@dataclass
class Options:
    presets: tuple = option(("DiT-XL/16", "DiP-XL/16"), "the two to compare", nargs=2,
                            metavar=("A", "B"))
    batch: int = option(1, "images a forward")
    repeat: int = option(10, "turns; the first of each is not counted")
    train: bool = option(False, "forward and backward of the loss, instead of a forward")
    grad_checkpoint: bool = option(False, "the second recomputes its activations, with --train")
    device: str = option("auto", "auto, cpu, cuda, mps")


def prepare(config, recompute, options, device):
    """A function that runs one pass of a model and returns its seconds."""
    torch.manual_seed(0)
    model = DiP(config).to(device)
    if recompute:
        prepare_model(model, TrainOptions(grad_checkpoint=True), Processes(0, 1, device))
    x = torch.randn(options.batch, 3, config.image_size, config.image_size, device=device)
    t = torch.rand(options.batch, device=device)
    y = torch.zeros(options.batch, dtype=torch.long, device=device)

    def one_pass():
        start = time.perf_counter()
        with autocast(device):
            if options.train:
                flow_matching_loss(model, x, y, t, x)[0].mean().backward()
                model.zero_grad()
            else:
                with torch.no_grad():
                    model(x, t, y)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return one_pass


def memory_of_one_pass(config, recompute, options, device):
    """(before, at its peak) in bytes, of one pass of a model, here and now."""
    def used():
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        status = Path("/proc/self/status")           # ru_maxrss there begins with the parent's
        if status.exists():
            return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) * 1024
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    one_pass, before = prepare(config, recompute, options, device), used()
    one_pass()
    return before, used()


def peak_memory(*arguments):
    """memory_of_one_pass in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(memory_of_one_pass, *arguments).result()


def take_turns(passes, repeat):
    """The seconds of every pass in every turn, but for the first turn, which warms up."""
    return [[one_pass() for one_pass in passes] for _ in range(repeat)][1:]


def main():
    options = parse_options(Options, __doc__)
    for name in options.presets:
        check_choice("--presets", name, PRESETS)
    at_least(2, repeat=options.repeat)
    device = start_processes(options.device).device
    pair = [(PRESETS[name], recompute)
            for name, recompute in zip(options.presets, (False, options.grad_checkpoint))]
    memory = [peak_memory(*model, options, device)[1] for model in pair]
    times = take_turns([prepare(*model, options, device) for model in pair], options.repeat)
    what = "forward + backward" if options.train else "forward"
    print(f"{what}, batch {options.batch}, {device}, {torch.get_num_threads()} threads, "
          f"n = {len(times)} after 1 warm-up")
    for name, (_, recompute), seconds, peak in zip(options.presets, pair, zip(*times), memory):
        print(f"{name + ' recomputed' * recompute:<22} median {statistics.median(seconds):7.3f} s  "
              f"(min {min(seconds):.3f}, max {max(seconds):.3f})   "
              f"peak memory {peak / 2**30:.2f} GiB")
    a, b = (statistics.median(seconds) for seconds in zip(*times))
    print(f"the second over the first: time {b / a:.3f}, memory {memory[1] / memory[0]:.3f}")


if __name__ == "__main__":
    run_main(main)
