"""Chapter 10: a GPU would find no wrong type and no needless work.

No GPU is needed: fake tensors have types and shapes and no values, and bf16 autocast runs on a CPU.
"""

from functools import partial

import pytest
import torch
from helpers import VARIANTS, awake, batch
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode

import common
import sample
import train
from common import Processes, keep_in_bf16, pieces
from dip import PRESETS, REPA_WEIGHT, DiP, cost, flow_matching_loss
from experiments import speed
from sample import euler, guided

CPU = Processes(rank=0, world=1, device=torch.device("cpu"))


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_trains_a_step_and_samples_under_bf16_autocast(name):
    """Two blocks of the full width, at the full image size, with REPA and recomputed activations:
    forbids products of different types, which a run in float32 never sees."""
    with FakeTensorMode():
        config = PRESETS[name].replace(depth=2, repa_dim=768)
        if config.head == "attention":
            config = config.replace(head_depth=2)
        model = DiP(config)
        ema = DiP(config).requires_grad_(False)
        train.prepare(model, train.TrainOptions(grad_checkpoint=True), CPU)
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0)
        x = torch.zeros(2, 3, config.image_size, config.image_size)
        y, t = torch.zeros(2, dtype=torch.long), torch.ones(2)
        with torch.autocast("cpu", torch.bfloat16):
            flow, repa = flow_matching_loss(model, x, y, t, x, torch.ones(2, 768, 16, 16))
        assert flow.dtype == repa.dtype == torch.float32
        (flow + REPA_WEIGHT * repa).mean().backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        optimizer.step()
        train.update_ema(ema, model, 0, 0.9999)
        with torch.autocast("cpu", torch.bfloat16):
            drawn = euler(guided(ema, y, 2.9, (0.03, 0.89)), x, 2)
        assert drawn.dtype == torch.float32 and drawn.shape == x.shape


@pytest.mark.parametrize("name", VARIANTS)
def test_weights_cast_to_bf16_once_draw_the_very_same_bits(name):
    """What autocast casts at every evaluation is cast before; last layers stay float32."""
    model = awake(VARIANTS[name]).requires_grad_(False)
    x, t, y = batch(model.config)
    with torch.autocast("cpu", torch.bfloat16):
        every_time = model(x, t, y)
        keep_in_bf16(model)
        once = model(x, t, y)
    assert torch.equal(every_time, once)
    assert any(p.dtype == torch.bfloat16 for p in model.parameters())


@pytest.mark.parametrize("name", VARIANTS)
def test_the_last_layer_is_float32_under_autocast(name):
    """prediction="x" divides its rounding by a small t: a bf16 output would be wrong by 1/256."""
    model, outputs = awake(VARIANTS[name]), []
    model.output.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(*batch(model.config))
    assert outputs[0].dtype == torch.float32
    assert not torch.equal(outputs[0], outputs[0].bfloat16().float())    # not rounded before


def test_no_step_of_a_guided_sampling_compiles_anew(monkeypatch):
    """Forbids a compilation at the ends of the guidance interval, or for each size of batch: all
    blocks share their programs, made for one size of batch and then for any."""
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    torch._dynamo.reset()
    model = awake(VARIANTS["unet"]).requires_grad_(False)
    common.compile_pieces(model)
    sample.generate(model, [0] * 3, steps=4, cfg=2.0, interval=(0.25, 0.75))
    kinds, first = len({type(piece) for piece in pieces(model)}), counter.frame_count
    assert kinds <= first <= 3 * kinds
    for B, interval in ((2, (0.25, 0.75)), (5, (0.1, 0.4)), (4, (0.0, 1.0))):
        sample.generate(model, [0] * B, steps=6, cfg=2.0, interval=interval)
    assert counter.frame_count == first


def test_every_block_and_head_is_one_piece():
    """An attention head is recomputed block by block: as one piece it needs four times the
    memory."""
    for name, count in (("none", 3), ("unet", 4), ("attention", 5), ("unet, hybrid", 5)):
        assert len(pieces(awake(VARIANTS[name]))) == count


def test_a_planned_step_is_three_forward_passes_and_four_where_activations_are_recomputed():
    """Backward passes have twice the FLOPs; what is recomputed is not kept.  Weights, gradients,
    two moments and the average are five times the weights."""
    config = PRESETS["DiP-Nano/16"].replace(depth=2)
    parameters, flops = cost(config)
    peaks = {}
    for recompute, passes in ((False, 3), (True, 4)):
        for B in (64, 128):
            peaks[recompute, B], roofline = speed.plan(config, B, recompute, "H100")
            assert roofline.flops == pytest.approx(passes * B * flops, rel=0.05)
            assert roofline.seconds >= roofline.launches * speed.LAUNCH
    assert 5 * 4 * parameters < peaks[True, 64] < peaks[False, 64] < peaks[False, 128]
    assert peaks[True, 128] - peaks[True, 64] < 0.9 * (peaks[False, 128] - peaks[False, 64])


def test_the_products_are_timed_and_nothing_else():
    a = torch.randn(64, 64)
    with speed.Products(CPU.device) as none:
        (a + a).sin().softmax(dim=1)
    with speed.Products(CPU.device) as some:
        a @ a
    assert none.seconds == 0 < some.seconds
