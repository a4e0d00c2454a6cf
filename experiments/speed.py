"""
What a head costs.

    python -m experiments.speed --presets                      # the table of presets in the README
    python -m experiments.speed DiT-XL/16 DiP-XL/16 --train    # measure passes, in turns
    python -m experiments.speed --plan DiP-XL/16 DiP-B/16      # predict training steps

"Products" is the time of the matrix products, convolutions and attention in one more pass, each
timed by itself: a floor for any code that leaves them as they are.  A prediction runs a training
step under bf16 autocast on fake tensors, which have no values.  Peak memory is MemTracker's.  Each
kernel takes the longest of its FLOPs, its bytes and a launch, at the peak rates of a card.
"""

import statistics
import time

import torch
import torch.utils._pytree as pytree
from torch._subclasses import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import train
from dip import PRESETS, DiP, flow_matching_loss
from sample import Parser, autocast, number, run, start_processes

PAPER_MILLIONS = {       # Tables 1, 2 and 3
    "DiT-XL/16": 629, "DiT-XL-deep/16": 772, "DiT-XL-1280/16": 776, "DiT-XL-1536/16": 1100,
    "DiP-XL/16": 631, "DiP-XL/16-mlp": 630, "DiP-XL/16-coordinate": 700, "DiP-XL/16-attention": 630,
    "DiP-XL/32": 631}
CARDS = {    # dense bf16 FLOP/s and bytes/s of the SXM cards, from NVIDIA's data sheets
    "A100": (312e12, 2.0e12), "H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12)}
LAUNCH = 5e-6            # seconds that a small kernel takes at least, an assumption
FLASH = "_scaled_dot_product_flash_attention"                # has another name on a CPU
FLOPS = flop_registry | {                                    # {operator: its FLOPs}
    getattr(torch.ops.aten, f"{FLASH}_for_cpu{way}"): flop_registry[
        getattr(torch.ops.aten, FLASH + way)] for way in ("", "_backward")}


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


class Roofline(TorchDispatchMode):
    """Counts what runs inside it: kernels, FLOPs, and the seconds they take at least on a card."""

    def __init__(self, card):
        super().__init__()
        self.rates, self.launches, self.flops, self.seconds = CARDS[card], 0, 0, 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if not function.is_view and function._schema.name != "aten::detach":
            moved = 0
            for side in ((args, kwargs), out):               # bytes read, bytes written
                tensors = [x for x in pytree.tree_leaves(side) if isinstance(x, torch.Tensor)]
                moved += sum({x.untyped_storage()._cdata: x.nbytes for x in tensors}.values())
            count = FLOPS.get(function._overloadpacket)
            flops = count(*args, **(kwargs or {}), out_val=out) if count else 0
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


def print_plan(names, B, card):
    print(f"| micro-batch {B}, one {card}, predicted | peak GiB | TFLOPs | kernels | ms, at least "
          f"| images/s, at most |\n|---|---|---|---|---|---|")
    for name in names:
        for recompute in (False, True):
            peak, found = plan(PRESETS[name], B, recompute, card)
            print(f"| {name}{', --grad-checkpoint' * recompute} | {peak / 2**30:.1f} | "
                  f"{found.flops / 1e12:.1f} | {found.launches} | {found.seconds * 1e3:.0f} | "
                  f"{B / found.seconds:.0f} |", flush=True)


def clock(device):
    """Seconds, after the kernels that are queued."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


class Products(TorchDispatchMode):
    """The seconds of the matrix products, convolutions and attention that run inside it."""

    def __init__(self, device):
        super().__init__()
        self.device, self.seconds = device, 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        start = clock(self.device)
        out = function(*args, **(kwargs or {}))
        if function._overloadpacket in FLOPS:
            self.seconds += clock(self.device) - start
        return out


def one_pass(model, options, device):
    """Forward pass of the loss, and backward with --train."""
    B, size = options.batch, model.config.image_size
    x, t = torch.ones(B, 3, size, size, device=device), torch.full((B,), 0.5, device=device)
    with autocast(device), torch.set_grad_enabled(options.train):
        flow, _ = flow_matching_loss(model, x, torch.zeros_like(t).long(), t, x)
    if options.train:
        flow.mean().backward()
        model.zero_grad()


def measure(options, device):
    """A line a preset.  Models take turns: whatever else the machine does touches all of them."""
    models = [train.prepare(DiP(PRESETS[name]).to(device), options) for name in options.models]
    turns = []
    for _ in range(options.repeat):
        for model in models:
            start = clock(device)
            one_pass(model, options, device)
            seconds = clock(device) - start
            with Products(device) as products:
                one_pass(model, options, device)
            turns.append((seconds, products.seconds))
    print(f"| batch {options.batch}, {device}, {torch.get_num_threads()} threads | s, median of "
          f"{options.repeat - 1} after a warm-up | least | most | products, s |\n|{'---|' * 5}")
    for k, name in enumerate(options.models):
        times, products = zip(*turns[k::len(models)][1:])
        print(f"| {name} | {statistics.median(times):.3f} | {min(times):.3f} | {max(times):.3f} | "
              f"{statistics.median(products):.3f} |")
    if device.type == "cuda":
        print(f"peak memory: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("models", nargs="*", default=["DiT-XL/16", "DiP-XL/16"], help="presets to measure")
    add("--presets", action="store_true", help="print the table of presets")
    add("--plan", nargs="+", choices=PRESETS, metavar="MODEL", help="presets to predict")
    add("--batch", type=number(int, 1), help="images at once [1; with --plan 32]")
    add("--card", default="H100", choices=CARDS, help="whose rates --plan takes [H100]")
    add("--repeat", type=number(int, 2), default=10, help="turns; the first warms up [10]")
    add("--train", action="store_true", help="measure forward and backward pass of the loss")
    add("--compile", action="store_true", help="torch.compile, block by block")
    add("--grad-checkpoint", action="store_true", help="recompute activations, with --train")
    add("--device", default="auto", help="auto, cpu, cuda, mps [auto]")
    options = parser.parse_args()
    options.batch = options.batch or (32 if options.plan else 1)
    device = start_processes(options.device)
    if options.presets:
        print_presets()
    elif options.plan:
        print_plan(options.plan, options.batch, options.card)
    else:
        measure(options, device)


if __name__ == "__main__":
    run(main)
