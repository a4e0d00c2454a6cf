"""
What a Patch Detailer Head costs.

    python -m experiments.speed --presets                      # the table of presets in the README
    python -m experiments.speed DiT-XL/16 DiP-XL/16 --train    # measure passes, in turns
    python -m experiments.speed --plan DiP-XL/16 DiP-B/16      # predict training steps

Measuring: models take turns, so that whatever else the machine does touches all of them; ratios are
those of the median times to the first.  "Products" is the time of the matrix products, convolutions
and attention in one more pass, each timed by itself.  Nothing that leaves them as they are can be
faster.  Peak memory is that of a fresh process (CPU) or of the allocator (CUDA), weights included.
Weights are random: they cost the same.

Predicting measures nothing.  A training step under bf16 autocast, without clipping, runs on fake
tensors, which have shapes and no values.  Peak memory is torch's MemTracker's.  Time is a roofline:
each kernel takes the longest of its FLOPs, its bytes and a launch, at the peak rates of a card.
"""

import multiprocessing
import re
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path

import torch
import torch.utils._pytree as pytree
from torch._subclasses import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import train
from dip import PRESETS, DiP, check_choice, flow_matching_loss
from sample import Parser, autocast, number, run, start_processes

PAPER_MILLIONS = {       # Tables 1, 2 and 3
    "DiT-XL/16": 629, "DiT-XL-deep/16": 772, "DiT-XL-1280/16": 776, "DiT-XL-1536/16": 1100,
    "DiP-XL/16": 631, "DiP-XL/16-mlp": 630, "DiP-XL/16-coordinate": 700, "DiP-XL/16-attention": 630,
    "DiP-XL/32": 631,
}


def cost(config, build=DiP):
    """(parameters, FLOPs of one image's forward pass) of build(config), on fake tensors: no memory.

    FLOPs are those of matrix products and convolutions; a multiply-add counts as 2.
    """
    # MATH: attention as plain matrix products, which are counted
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model = build(config)
        image = torch.empty(1, 3, config.image_size, config.image_size)
        with FlopCounterMode(display=False) as counter:
            model(image, torch.empty(1), torch.empty(1, dtype=torch.long))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops()


def print_presets():
    """The README's table of presets, except its last column, which --plan predicts."""
    print("| preset | parameters | GFLOPs | tokens | paper |\n|---|---|---|---|---|")
    for name, config in PRESETS.items():
        parameters, flops = cost(config)
        tokens = (config.image_size // config.patch_size) ** 2
        paper = f"{PAPER_MILLIONS[name]} M" if name in PAPER_MILLIONS else "-"
        print(f"| {name} | {parameters / 1e6:.1f} M | {flops / 1e9:.1f} | {tokens} | {paper} |")


# -------------------------------------------------------------------------------------------------
# Prediction

CARDS = {    # dense bf16 FLOP/s and bytes/s of the SXM cards, from NVIDIA's data sheets
    "A100": (312e12, 2.0e12), "H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12)}
LAUNCH = 5e-6            # seconds that a small kernel takes at least, an assumption
aten = torch.ops.aten    # on fake tensors of a CPU flash attention has another name
FLOPS = flop_registry | {                                    # {operator: its FLOPs}
    aten._scaled_dot_product_flash_attention_for_cpu:
        flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward:
        flop_registry[aten._scaled_dot_product_flash_attention_backward]}


class Roofline(TorchDispatchMode):
    """Counts what runs inside it: kernels, FLOPs, and the seconds they take at least on a card."""

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
        train.prepare(model, train.parse(["--grad-checkpoint"] * grad_checkpoint))
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
    return memory.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"], roofline


def print_plan(options):
    """A Markdown table: a line a preset, plain and with --grad-checkpoint."""
    print(f"| predicted, micro-batch {options.batch} | peak memory | FLOPs | kernels | "
          f"ms on one {options.card}, at least | images/s, at most |\n|---|---|---|---|---|---|")
    for name in options.plan:
        for recompute in (False, True):
            peak, roofline = plan(PRESETS[name], options.batch, recompute, options.card)
            print(f"| {name}{', --grad-checkpoint' * recompute} | {peak / 2**30:.1f} GiB | "
                  f"{roofline.flops / 1e12:.1f} T | {roofline.launches} | "
                  f"{roofline.seconds * 1e3:.0f} | "
                  f"{options.batch / roofline.seconds:.0f} |", flush=True)


# -------------------------------------------------------------------------------------------------
# Measurement


def wait(device):
    """For the kernels that are queued."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


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


def make_pass(name, options, device):
    """A function that runs one pass of a preset and returns its seconds."""
    torch.manual_seed(0)
    config = PRESETS[name]
    model = DiP(config).to(device)
    train.prepare(model, options)
    x = torch.randn(options.batch, 3, config.image_size, config.image_size, device=device)
    t = torch.rand(options.batch, device=device)
    y = torch.zeros(options.batch, dtype=torch.long, device=device)

    def one_pass():
        start = time.perf_counter()
        with autocast(device), torch.set_grad_enabled(options.train):
            if options.train:
                flow_matching_loss(model, x, y, t, x)[0].mean().backward()
                model.zero_grad()
            else:
                model(x, t, y)
        wait(device)
        return time.perf_counter() - start

    return one_pass


def products_of(one_pass, device):
    """The seconds of the products of one pass."""
    with Products(device) as mode:
        one_pass()
    return mode.seconds


def peak_memory(name, options):
    """Peak bytes of one pass of a preset, in the process that calls it."""
    device = start_processes(options.device)
    make_pass(name, options, device)()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")       # ru_maxrss there begins with the parent's
    if status.exists():
        return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(options, device):
    """Print a line a preset: times, products, peak memory in a fresh process."""
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh, max_tasks_per_child=1) as process:
        memory = list(process.map(peak_memory, options.models, repeat(options)))
    passes = [make_pass(name, options, device) for name in options.models]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a = torch.randn(2048, 2048, device=device, dtype=dtype)
    turns = [[[products_of(lambda: a @ a, device)], [one_pass() for one_pass in passes],
              [products_of(one_pass, device) for one_pass in passes]]
             for _ in range(options.repeat)][1:]             # the first turn warms up
    (square,), times, products = ([statistics.median(x) for x in zip(*part)] for part in zip(*turns))
    print(f"{'forward + backward' if options.train else 'forward'}, batch {options.batch}, {device}, "
          f"{torch.get_num_threads()} threads, medians of n = {len(turns)} after 1 warm-up; a "
          f"product of two 2048 x 2048 matrices runs at {2 * 2048**3 / square / 1e9:.0f} GFLOP/s")
    print(f"{'':<22}{'time':>9}{'min to max':>17}{'to first':>10}{'products':>11}{'to first':>10}"
          f"{'GFLOP/s':>9}{'peak memory':>15}{'to first':>10}")
    for k, name in enumerate(options.models):
        flops = cost(PRESETS[name])[1] * options.batch * (3 if options.train else 1)
        all_times = [turn[1][k] for turn in turns]
        print(f"{name:<22}{times[k]:>7.3f} s{min(all_times):>9.3f} {max(all_times):>7.3f}"
              f"{times[k] / times[0]:>10.3f}{products[k]:>9.3f} s{products[k] / products[0]:>10.3f}"
              f"{flops / times[k] / 1e9:>9.0f}{memory[k] / 2**30:>11.2f} GiB"
              f"{memory[k] / memory[0]:>10.3f}")


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("models", nargs="*", default=["DiT-XL/16", "DiP-XL/16"], help="presets to measure")
    add("--presets", action="store_true", help="print the table of presets")
    add("--plan", nargs="+", default=[], metavar="MODEL", help="presets to predict")
    add("--batch", type=number(int, 1), help="images at once [1; with --plan 32]")
    add("--card", default="H100", choices=CARDS, help="whose rates are taken, with --plan [H100]")
    add("--repeat", type=number(int, 2), default=10, help="turns; the first warms up [10]")
    add("--train", action="store_true", help="measure forward and backward pass of the loss")
    add("--compile", action="store_true", help="torch.compile, block by block")
    add("--grad-checkpoint", action="store_true", help="recompute activations, with --train")
    add("--device", default="auto", help="auto, cpu, cuda, mps [auto]")
    options = parser.parse_args()
    for name in (*options.models, *options.plan):
        check_choice("preset", name, PRESETS)
    device = start_processes(options.device)
    options.batch = options.batch or (32 if options.plan else 1)
    if options.presets:
        print_presets()
    elif options.plan:
        print_plan(options)
    else:
        measure(options, device)


if __name__ == "__main__":
    run(main)
