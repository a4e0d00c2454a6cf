"""
What the Patch Detailer Head costs: forwards of two presets, side by side in one run.

    python -m experiments.speed     # DiP-XL/16 against DiT-XL/16, one image
    python -m experiments.speed --presets DiT-XL/16 DiP-XL/16-attention --batch 4 --train

The two models take turns, so that whatever else the machine does touches both; the ratio is that
of the median times.  Peak memory is that of a fresh process (CPU) or of the allocator (CUDA), and
counts the weights.  Weights are random: they cost the same.
"""

import multiprocessing
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch

from dip import PRESETS, DiP, flow_matching_loss, check_choice
from sample import at_least, autocast, option, parse_options, run_main, start_processes


@dataclass
class Options:
    presets: tuple = option(("DiT-XL/16", "DiP-XL/16"), "the two to compare", nargs=2,
                            metavar=("A", "B"))
    batch: int = option(1, "images a forward")
    repeat: int = option(10, "turns; the first of each is not counted")
    train: bool = option(False, "forward and backward of the loss, instead of a forward")
    device: str = option("auto", "auto, cpu, cuda, mps")


def prepare(name, options, device):
    """A function that runs one pass of a preset and returns its seconds."""
    config = PRESETS[name]
    torch.manual_seed(0)
    model = DiP(config).to(device)
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


def peak_memory(name, options, device):
    """Peak memory of one pass of a preset, in bytes; to be called in a process of its own."""
    prepare(name, options, device)()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main():
    options = parse_options(Options, __doc__)
    for name in options.presets:
        check_choice("--presets", name, PRESETS)
    at_least(2, repeat=options.repeat)
    device = start_processes(options.device).device
    memory = []
    for name in options.presets:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            memory.append(process.submit(peak_memory, name, options, device).result())
    passes = [prepare(name, options, device) for name in options.presets]
    times = [[one_pass() for one_pass in passes] for _ in range(options.repeat)][1:]
    what = "forward + backward" if options.train else "forward"
    print(f"{what}, batch {options.batch}, {device}, {torch.get_num_threads()} threads, "
          f"n = {len(times)} after 1 warm-up")
    for name, seconds, peak in zip(options.presets, zip(*times), memory):
        print(f"{name:<22} median {statistics.median(seconds):7.3f} s  (min {min(seconds):.3f}, "
              f"max {max(seconds):.3f})   peak memory {peak / 2**30:.2f} GiB")
    a, b = (statistics.median(seconds) for seconds in zip(*times))
    print(f"ratio {options.presets[1]} : {options.presets[0]}   "
          f"time {b / a:.3f}   memory {memory[1] / memory[0]:.3f}")


if __name__ == "__main__":
    run_main(main)
