"""
What a head costs.

    python -m experiments.speed --presets                      # the table of presets in the README
    python -m experiments.speed DiT-XL/16 DiP-XL/16 --train    # time passes; models take turns
    python -m experiments.speed --plan DiP-XL/16 DiP-B/16      # predict the memory of training

A prediction runs a training step under bf16 autocast on fake tensors, which have no values.
"""

import statistics
import time

import torch
from torch._subclasses import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

import train
from dip import PRESETS, DiP, check_choice, flow_matching_loss
from sample import Parser, autocast, number, run, start_processes

PAPER_MILLIONS = {       # Tables 1, 2 and 3
    "DiT-XL/16": 629, "DiT-XL-deep/16": 772, "DiT-XL-1280/16": 776, "DiT-XL-1536/16": 1100,
    "DiP-XL/16": 631, "DiP-XL/16-mlp": 630, "DiP-XL/16-coordinate": 700, "DiP-XL/16-attention": 630,
    "DiP-XL/32": 631}


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
    """The README's table of presets."""
    print("| preset | parameters | GFLOPs | paper's parameters |\n|---|---|---|---|")
    for name, config in PRESETS.items():
        parameters, flops = cost(config)
        paper = f"{PAPER_MILLIONS[name]} M" if name in PAPER_MILLIONS else "-"
        print(f"| {name} | {parameters / 1e6:.1f} M | {flops / 1e9:.1f} | {paper} |")


def plan(config, micro_batch, grad_checkpoint):
    """Peak bytes of a training step: the model, its gradients, Adam's moments and EMA, one
    micro-batch, and the update, on fake tensors."""
    with FakeTensorMode():
        model = DiP(config)
        ema = [torch.empty_like(p) for p in model.parameters()]
        optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
        for p in model.parameters():         # the first step creates Adam's moments
            p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad()
        train.prepare(model, train.parse(["--grad-checkpoint"] if grad_checkpoint else []))
        x = torch.empty(micro_batch, 3, config.image_size, config.image_size)
        y, t = torch.zeros(micro_batch, dtype=torch.long), torch.ones(micro_batch)
        memory = MemTracker()
        memory.track_external(model, optimizer, *ema, x, y, t)
        with memory:
            with torch.autocast("cpu", torch.bfloat16):
                flow, _ = flow_matching_loss(model, x, y, t, x)
            flow.mean().backward()
            optimizer.step()
            torch._foreach_lerp_(ema, list(model.parameters()), 1e-4)
    return memory.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


def print_plan(names, B):
    print(f"| micro-batch {B}, predicted peak, GiB | plain | --grad-checkpoint |\n|---|---|---|")
    for name in names:
        plain, recomputed = (plan(PRESETS[name], B, again) / 2**30 for again in (False, True))
        print(f"| {name} | {plain:.1f} | {recomputed:.1f} |", flush=True)


def clock(device):
    """Time in seconds, once all queued kernels are done."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def seconds(model, options, device):
    """Time one forward pass of the loss, and its backward pass with --train."""
    B, size = options.batch, model.config.image_size
    x, t = torch.ones(B, 3, size, size, device=device), torch.full((B,), 0.5, device=device)
    start = clock(device)
    with autocast(device), torch.set_grad_enabled(options.train):
        flow, _ = flow_matching_loss(model, x, torch.zeros_like(t).long(), t, x)
    if options.train:
        flow.mean().backward()
        model.zero_grad()
    return clock(device) - start


def products(one_pass, device):
    """The fraction of a pass's time in matrix products, convolutions and attention."""
    with profile() as profiler:
        one_pass()
    kind = "cpu" if device.type == "cpu" else "device"
    times = {event.key: getattr(event, f"self_{kind}_time_total")
             for event in profiler.key_averages() if event.key.startswith("aten::")}
    part = sum(microseconds for name, microseconds in times.items()
               if name.endswith("mm") or "conv" in name or "attention" in name)
    return part / sum(times.values())


def measure(options, device):
    """One line per preset.  Models take turns, so other load slows all of them alike."""
    models = [train.prepare(DiP(PRESETS[name]).to(device), options) for name in options.models]
    turns = [[seconds(model, options, device) for model in models] for _ in range(options.repeat)]
    parts = [products(lambda: seconds(model, options, device), device) for model in models]
    print(f"| batch {options.batch}, {device}, {torch.get_num_threads()} threads | s, median of "
          f"{options.repeat - 1} after a warm-up | least | most | in products |\n|-|-|-|-|-|")
    for name, part, times in zip(options.models, parts, zip(*turns[1:])):
        print(f"| {name} | {statistics.median(times):.3f} | {min(times):.3f} | {max(times):.3f} | "
              f"{part:.0%} |")
    if device.type == "cuda":
        print(f"peak memory: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("models", nargs="*", default=["DiT-XL/16", "DiP-XL/16"], help="presets to measure")
    add("--presets", action="store_true", help="print the table of presets")
    add("--plan", nargs="+", choices=PRESETS, metavar="MODEL", help="presets to predict")
    add("--batch", type=number(int, 1), help="images at once [1; with --plan 32]")
    add("--repeat", type=number(int, 2), default=10, help="turns; the first warms up [10]")
    add("--train", action="store_true", help="measure forward and backward pass of the loss")
    add("--compile", action="store_true", help="torch.compile, block by block")
    add("--grad-checkpoint", action="store_true", help="recompute activations, with --train")
    add("--device", default="auto", help="auto, cpu, cuda, mps [auto]")
    options = parser.parse_args()
    for name in options.models:
        check_choice("preset", name, PRESETS)
    options.batch = options.batch or (32 if options.plan else 1)
    device = start_processes(options.device)
    if options.presets:
        print_presets()
    elif options.plan:
        print_plan(options.plan, options.batch)
    else:
        measure(options, device)


if __name__ == "__main__":
    run(main)
