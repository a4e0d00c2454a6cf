"""Chapter 10.  The law of devices: a GPU finds bfloat16 where it is fast, float32 where digits
matter, and no needless compilation.

No GPU is needed: bf16 autocast runs on a CPU.
"""

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import SMALL, VARIANTS, awake, batch
from torch._dynamo.testing import CompileCounter
from torch.overrides import TorchFunctionMode

import sample
import train
from dip import REPA_WEIGHT, Block, DiP, flow_matching_loss
from sample import autocast, blocks_of, compile_blocks, euler, generate, guided, start_processes

# --- the types under autocast ---------------------------------------------------------------------


def test_autocast_is_bfloat16_on_a_gpu_and_off_on_a_cpu(monkeypatch):
    """Catches float16, which overflows at 65504, and bfloat16 where results must be exact."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    with autocast(torch.device("cuda")):
        assert torch.is_autocast_enabled("cuda")
        assert torch.get_autocast_dtype("cuda") == torch.bfloat16
    with autocast(torch.device("cpu")):
        assert not torch.is_autocast_enabled("cpu")


def test_training_validation_and_sampling_run_the_network_under_autocast(monkeypatch):
    """Here autocast() turns itself on for a CPU.  Catches a command that leaves it out or makes its
    own, which a run on a CPU never notices."""
    for module in (train, sample):
        monkeypatch.setattr(module, "autocast", lambda device: torch.autocast(
            device.type, torch.bfloat16))
    seen = {}

    def note(who):
        on = torch.is_autocast_enabled("cpu")
        seen[who] = torch.get_autocast_dtype("cpu") if on else None

    def encoder(x_0):
        note("encoder")
        return torch.randn(2, 6, 4, 4)

    options = train.parse("--batch-size 2 --steps 5".split())
    train.configure(options, torch.device("cpu"))
    data, model = train.Shapes(16, 20), DiP(SMALL.replace(num_classes=10, repa_dim=6))
    model.register_forward_pre_hook(lambda model, inputs: note(who))
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters())
    who = "training"
    train.training_step(model, ema, optimizer, train.load_batches(options, data, 0), 0, options,
                        encoder)
    who = "validation"
    train.validate(model, data, 2, 2)
    who = "sampling"
    assert generate(model, [0], steps=1).dtype == torch.float32
    assert seen == dict.fromkeys(["training", "encoder", "validation", "sampling"], torch.bfloat16)


@pytest.mark.parametrize("name", VARIANTS)
def test_noise_is_drawn_on_the_cpu_and_nothing_else_is_made_there(monkeypatch, name):
    """The meta device stands for a GPU.  Catches angles, zeros or sums without `device=`, and
    images that are other ones on a GPU."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())   # it knows no meta
    drawn, moved, normal_ = [], [], torch.Tensor.normal_
    with torch.device("meta"):
        model = DiP(VARIANTS[name].replace(repa_dim=6))
        (x, features), t, y = torch.zeros(2, 2, 6, 16, 16), torch.zeros(2), torch.zeros(2).long()
    for given in (None, features):
        losses = flow_matching_loss(model, x[:, :3], y, t, x[:, 3:], given)
        assert {part.device for part in (*losses, train.by_time(t, *losses))} == {x.device}
    monkeypatch.setattr(torch.Tensor, "normal_", lambda x, generator: drawn.append(
        x.device.type) or normal_(x, generator=generator))
    monkeypatch.setitem(sample.SAMPLERS, "euler", lambda velocity, x, steps: moved.append(
        x.device.type) or torch.zeros(x.shape))
    generate(model, [0])
    assert (drawn, moved) == (["cpu"], ["meta"])


class Precise(TorchFunctionMode):
    """Inside, what normalises must take and return float32: norms, generated weights, cosines."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if function in (F.rms_norm, F.layer_norm, F.normalize, F.cosine_similarity):
            found = {x.dtype for x in (*args, result) if torch.is_tensor(x)}
            assert found == {torch.float32}, f"{function.__name__} in {found}"
        return result


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.filterwarnings("error", "ignore::ResourceWarning")     # of an earlier test's files
def test_under_autocast_products_are_bfloat16_and_what_needs_digits_is_float32(name):
    """Float32: norms, generated weights, tokens between blocks, each last layer, the velocity, the
    loss and the gradients.  Catches a residual stream rounded to 8 bits at every block, a last
    layer in bfloat16, which prediction="x" magnifies by 1/t, and products of different types."""
    model = awake(VARIANTS[name].replace(repa_dim=6))
    train.prepare(model, train.parse(["--grad-checkpoint"]))
    found, expected, handles = {}, {}, []
    for module_name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, Block)):
            last = module_name.endswith(("head.out", "output.linear")) or isinstance(module, Block)
            expected[module_name] = torch.float32 if last else torch.bfloat16
            handles.append(module.register_forward_hook(
                lambda module, inputs, output, at=module_name: found.update({at: output.dtype})))
    x, t, y = batch(model.config)
    noise, features = torch.randn_like(x), torch.randn(2, 6, 4, 4)
    with Precise(), torch.autocast("cpu", torch.bfloat16):
        v, _ = model(x, t, y, align=True)
        flow, repa = flow_matching_loss(model, x, y, t, noise, features)
        drawn = euler(guided(model, y, 2.9), x, 1)
    assert found == expected
    (flow + REPA_WEIGHT * repa).mean().backward()
    assert {v.dtype, flow.dtype, repa.dtype, drawn.dtype} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert not torch.equal(v, v.bfloat16().float())          # nor was it rounded before
    for handle in handles:
        handle.remove()
    exact = model(x, t, y)
    assert (v - exact).norm() < 0.05 * exact.norm()          # bf16 keeps 8 bits of every product


# --- one GPU for each process, and programs for it ------------------------------------------------


def test_a_process_takes_the_gpu_of_its_local_rank(monkeypatch):
    """Catches RANK, which on a second machine of 8 GPUs begins at 8."""
    chosen = []
    monkeypatch.setenv("RANK", "11")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch, "ones", lambda *size, device: torch.zeros(size))
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert start_processes("cuda") == torch.device("cuda:3") and chosen == ["cuda:3"]


def test_no_step_of_a_guided_sampling_compiles_anew(monkeypatch):
    """All blocks share their programs, made for one size of batch and then for any.  Catches a
    compilation at the ends of the guidance interval, or for each size of batch."""
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    torch._dynamo.reset()
    model = awake(VARIANTS["unet"]).requires_grad_(False)
    compile_blocks(model)
    generate(model, [0] * 3, steps=4, cfg=2.0, interval=(0.25, 0.75))
    kinds, first = len({type(block) for block in blocks_of(model)}), counter.frame_count
    assert kinds <= first <= 3 * kinds
    for B, interval in ((2, (0.25, 0.75)), (5, (0.1, 0.4)), (4, (0.0, 1.0))):
        generate(model, [0] * B, steps=6, cfg=2.0, interval=interval)
    assert counter.frame_count == first


def test_every_block_and_every_head_is_compiled_and_recomputed_by_itself():
    """An attention head goes block by block: recomputed at once it needs four times the memory."""
    for name, count in (("none", 3), ("unet", 4), ("attention", 5), ("unet, hybrid", 5)):
        model = awake(VARIANTS[name])
        blocks = blocks_of(model)
        assert len(blocks) == len(set(blocks)) == count
        assert sum(p.numel() for block in blocks for p in block.parameters()) > 0.4 * sum(
            p.numel() for p in model.parameters())
