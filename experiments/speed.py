"""
What the Patch Detailer Head costs: passes of several presets, in turns in one run.

    python -m experiments.speed     # DiP-XL/16 against DiT-XL/16, one image
    python -m experiments.speed --presets DiT-XL/16 DiP-XL/16 DiP-XL/16-coordinate --train
    python -m experiments.speed --plan DiP-XL/16 DiP-B/16           # predict training steps

The models take turns, so that whatever else the machine does touches all; ratios are those of the
median times to the first.  "Products" is the part of one more pass that its matrix products,
convolutions and attention take, each timed by itself: nothing can be faster that leaves them as
they are.  Peak memory is that of a fresh process (CPU) or of the allocator (CUDA), and counts the
weights.  Weights are random: they cost the same.

--plan measures nothing.  A training step under bf16 autocast, without clipping, is run on fake
tensors, which have shapes and no values: peak memory is torch's MemTracker's, time is that of a
roofline, in which each kernel takes the longest of its FLOPs, its bytes and a launch, at the peak
rates of a named card.
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
import torch.utils._pytree as pytree
from torch._subclasses import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from common import Processes, at_least, autocast, option, parse_options, run_main, start_processes
from dip import PRESETS, DiP, check_choice, cost, flow_matching_loss
from train import TrainOptions
from train import prepare as prepare_model

aten = torch.ops.aten    # on fake tensors of a CPU flash attention has another name
FLOPS = flop_registry | {                                    # {operator: its FLOPs}
    aten._scaled_dot_product_flash_attention_for_cpu:
        flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward:
        flop_registry[aten._scaled_dot_product_flash_attention_backward]}


@dataclass
class Options:
    presets: tuple = option(("DiT-XL/16", "DiP-XL/16"), "those to compare", nargs="+",
                            metavar="MODEL")
    batch: int = option(1, "images per forward pass")
    repeat: int = option(10, "turns; the first of each is not counted")
    train: bool = option(False, "forward and backward pass of the loss")
    grad_checkpoint: bool = option(False, "recompute activations, with --train")
    device: str = option("auto", "auto, cpu, cuda, mps")
    plan: tuple = option((), "predict the training of these presets", nargs="+", metavar="MODEL",
                         group="prediction")
    micro_batch: int = option(32, "images at once")
    card: str = option("H100", "whose rates are taken", choices=("A100", "H100", "H200"))


def wait(device):
    """For the kernels that are queued."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def prepare(config, options, device):
    """A function that runs one pass of a model and returns its seconds."""
    torch.manual_seed(0)
    model = DiP(config).to(device)
    if options.grad_checkpoint:
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
        wait(device)
        return time.perf_counter() - start

    return one_pass


class Products(TorchDispatchMode):
    """The seconds of the matrix products, convolutions and attention that run inside it."""

    def __init__(self, device):
        super().__init__()
        self.device, self.seconds = device, 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        wait(self.device)
        start = time.perf_counter()
        out = function(*args, **(kwargs or {}))
        wait(self.device)
        if function._overloadpacket in FLOPS:
            self.seconds += time.perf_counter() - start
        return out


def prepare_products(one_pass, device):
    """A function that runs the pass once more and returns the seconds of its products."""
    def products():
        with Products(device) as mode:
            one_pass()
        return mode.seconds

    return products


def prepare_matmul(device, side=2048):
    """The same of one product of two square matrices, in the precision of the passes."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a = torch.randn(side, side, device=device, dtype=dtype)
    return prepare_products(lambda: a @ a, device)


def memory_of_one_pass(config, options, device):
    """Peak bytes of one pass of a model, here and now."""
    def used():
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        status = Path("/proc/self/status")           # ru_maxrss there begins with the parent's
        if status.exists():
            return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) * 1024
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    prepare(config, options, device)()
    return used()


def peak_memory(*arguments):
    """memory_of_one_pass in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(memory_of_one_pass, *arguments).result()


def take_turns(passes, repeat):
    """The seconds of every pass in every turn except the first, which warms up."""
    return [[one_pass() for one_pass in passes] for _ in range(repeat)][1:]


# -------------------------------------------------------------------------------------------------
# Prediction

CARDS = {    # dense bf16 FLOP/s and bytes/s of the SXM cards, from NVIDIA's data sheets
    "A100": (312e12, 2.0e12), "H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12)}
LAUNCH = 5e-6            # seconds: what a small kernel takes at least, an assumption


class Roofline(TorchDispatchMode):
    """Counts what is run inside it: kernels, FLOPs, bytes read and written, and the seconds that
    they take at least on a card."""

    def __init__(self, card):
        super().__init__()
        self.rates, self.launches, self.flops, self.seconds = CARDS[card], 0, 0, 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        read, written = (pytree.tree_leaves(x) for x in ((args, kwargs), out))
        storages = [{x.untyped_storage()._cdata: x.nbytes for x in tensors
                     if isinstance(x, torch.Tensor)} for tensors in (read, written)]
        if not function.is_view and function._schema.name != "aten::detach":
            count = FLOPS.get(function._overloadpacket)
            flops = count(*args, **(kwargs or {}), out_val=out) if count else 0
            moved = sum(sum(sizes.values()) for sizes in storages)
            self.launches, self.flops = self.launches + 1, self.flops + flops
            self.seconds += max(LAUNCH, flops / self.rates[0], moved / self.rates[1])
        return out


def plan(config, micro_batch, grad_checkpoint, card):
    """(peak bytes, Roofline) of a training step: the model, its gradients, Adam's moments and EMA,
    one micro-batch, and the update, on fake tensors."""
    with FakeTensorMode():
        model = DiP(config)
        ema = [torch.empty_like(p) for p in model.parameters()]
        optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
        for p in model.parameters():         # its moments are there from the first step on
            p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad()
        settings = TrainOptions(grad_checkpoint=grad_checkpoint)
        prepare_model(model, settings, Processes(0, 1, torch.device("cpu")))
        x = torch.empty(micro_batch, 3, config.image_size, config.image_size)
        y, t = torch.zeros(micro_batch, dtype=torch.long), torch.ones(micro_batch)
        memory, roofline = MemTracker(), Roofline(card)
        memory.track_external(model, optimizer, *ema, x, y, t)
        with memory, roofline:
            with torch.autocast("cpu", torch.bfloat16):
                flow, _ = flow_matching_loss(model, x, y, t, x)
            flow.mean().backward()
            optimizer.step()
            torch._foreach_lerp_(ema, list(model.parameters()), 1e-4)
    total = memory.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    return total, roofline


def print_plan(options):
    """A Markdown table: a line a preset, plain and with --grad-checkpoint."""
    print(f"| predicted, micro-batch {options.micro_batch} | peak memory | FLOPs | kernels | "
          f"ms on one {options.card}, at least | images/s, at most |\n|---|---|---|---|---|---|")
    for name in options.plan:
        for recompute in (False, True):
            peak, roofline = plan(PRESETS[name], options.micro_batch, recompute, options.card)
            print(f"| {name}{', --grad-checkpoint' * recompute} | {peak / 2**30:.1f} GiB | "
                  f"{roofline.flops / 1e12:.1f} T | {roofline.launches} | "
                  f"{roofline.seconds * 1e3:.0f} | "
                  f"{options.micro_batch / roofline.seconds:.0f} |", flush=True)


def main():
    options = parse_options(Options, __doc__)
    for field in ("presets", "plan"):
        for name in getattr(options, field):
            check_choice(f"--{field}", name, PRESETS)
    at_least(2, repeat=options.repeat)
    at_least(1, batch=options.batch, micro_batch=options.micro_batch)
    if options.plan:
        return print_plan(options)
    device = start_processes(options.device).device
    configs = [PRESETS[name] for name in options.presets]
    memory = [peak_memory(config, options, device) for config in configs]
    passes = [prepare(config, options, device) for config in configs]
    products = [prepare_products(one_pass, device) for one_pass in passes]
    times = take_turns([prepare_matmul(device), *passes, *products], options.repeat)
    seconds = [statistics.median(column) for column in zip(*times)]
    passed, products = seconds[1:len(passes) + 1], seconds[len(passes) + 1:]
    what = "forward + backward" if options.train else "forward"
    print(f"{what}, batch {options.batch}, {device}, {torch.get_num_threads()} threads, medians of "
          f"n = {len(times)} after 1 warm-up; a product of two 2048 x 2048 matrices runs at "
          f"{2 * 2048**3 / seconds[0] / 1e9:.0f} GFLOP/s")
    print(f"{'':<22}{'time':>9}{'min to max':>17}{'to first':>10}{'products':>11}{'to first':>10}"
          f"{'GFLOP/s':>9}{'peak memory':>15}{'to first':>10}")
    for k, (name, config) in enumerate(zip(options.presets, configs)):
        flops = cost(config)[1] * options.batch * (3 if options.train else 1)
        turns = [turn[k + 1] for turn in times]
        print(f"{name:<22}{passed[k]:>7.3f} s{min(turns):>9.3f} {max(turns):>7.3f}"
              f"{passed[k] / passed[0]:>10.3f}{products[k]:>9.3f} s"
              f"{products[k] / products[0]:>10.3f}{flops / passed[k] / 1e9:>9.0f}"
              f"{memory[k] / 2**30:>11.2f} GiB{memory[k] / memory[0]:>10.3f}")


if __name__ == "__main__":
    run_main(main)
