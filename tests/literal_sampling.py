"""
Sampling and training as one would write them down on paper: slow, on plain numbers or one image at
a time, and sharing no code with sample.py and train.py.  Read them beside the fast versions.

A velocity field is a function v(x, t); t falls from 1, noise, to 0, data.
"""

import copy
import math

import torch

# -------------------------------------------------------------------------------------------------
# Samplers, on one number x


def time_grid(steps):
    """Even times from 1 to 0."""
    return [1 - k / steps for k in range(steps + 1)]


def euler(v, x, times):
    """Follow the tangent."""
    for i in range(len(times) - 1):
        x = x - (times[i] - times[i + 1]) * v(x, times[i])
    return x


def heun(v, x, times):
    """Follow the tangent, look at the slope there, come back, and follow the mean of both slopes.
    At t = 0 the slope is not known well: the last step follows the tangent."""
    for i in range(len(times) - 1):
        h = times[i] - times[i + 1]
        tangent = slope = v(x, times[i])
        if times[i + 1] > 0:
            slope = (tangent + v(x - h * tangent, times[i + 1])) / 2
        x = x - h * slope
    return x


def adams_bashforth(v, x, times):
    """Integrate the straight line through the last two velocities, over times h apart.

    The line is a + b (t - t_i).  Its integral from t_i to t_i - h is  -a h + b h^2 / 2.
    """
    h = times[0] - times[1]
    x_before, x = x, x - h * v(x, times[0])                  # nothing before it: Euler
    for i in range(1, len(times) - 1):
        a = v(x, times[i])
        b = (v(x_before, times[i - 1]) - a) / h
        x_before, x = x, x - a * h + b * h**2 / 2
    return x


def euler_maruyama(v, x, times, normals):
    """dx = [v - w/2 score] dt + sqrt(w) dW backwards in time, with w(t) = t, and

        score = -eps/t,    eps = x + (1 - t) v    (of x = (1 - t) x_0 + t eps, v = eps - x_0)

    so that -w/2 score = eps/2.  Over h of time the noise has the variance w h = t h.
    """
    for i in range(len(times) - 1):
        t, h = times[i], times[i] - times[i + 1]
        velocity = v(x, t)
        if times[i + 1] == 0:
            return x - h * velocity
        eps = x + (1 - t) * velocity
        score = -eps / t
        x = x - h * (velocity - t / 2 * score) + math.sqrt(t * h) * normals[i]
    return x


def integrate(sampler, v, x, times, normals):
    """By the name of the sampler; only the SDE takes the normals."""
    if sampler == "sde":
        return euler_maruyama(v, x, times, normals)
    return {"euler": euler, "heun": heun, "ab2": adams_bashforth}[sampler](v, x, times)


# -------------------------------------------------------------------------------------------------
# Guidance, and one image


@torch.no_grad()
def sample(model, label, stream, size, sampler, steps, cfg, interval):
    """One image (3, H, W), alone.  The velocity is v_0 + cfg (v_y - v_0) inside the interval, v_y
    outside.  The stream gives the starting noise first, then that of each SDE step."""
    def v(x, t):
        v_y, v_0 = (model(x[None], torch.tensor([float(t)]), torch.tensor([y]))[0]
                    for y in (label, model.config.num_classes))
        return v_y if t < interval[0] or t > interval[1] else v_0 + cfg * (v_y - v_0)

    x = torch.randn(3, *size, generator=stream)
    drawn = steps - 1 if sampler == "sde" else 0
    normals = [torch.randn(3, *size, generator=stream) for _ in range(drawn)]
    return integrate(sampler, v, x, time_grid(steps), normals)


# -------------------------------------------------------------------------------------------------
# Training


def learning_rate(step, steps, lr, warmup, cooldown):
    """Of steps 0, 1, ...: 1/(w+1), 2/(w+1), ... of lr, then lr; the last c n steps fall in a line
    that would reach 0 one step after the end."""
    rate = lr
    if step < warmup:
        rate = lr * (step + 1) / (warmup + 1)
    left = steps - step
    if left < cooldown * steps + 1:
        rate = min(rate, lr * left / (cooldown * steps + 1))
    return rate


def example(data, order, k, seed, purpose, stream):
    """Example k as (x_0, y, noise, z, u), from the streams of (seed, k); training images are
    flipped by a coin."""
    pixels, label = data[order[k]]
    numbers = stream(seed, purpose, k)
    z, (u, coin) = torch.randn((), generator=numbers), torch.rand(2, generator=numbers)
    x_0 = torch.tensor(pixels).permute(2, 0, 1) / 127.5 - 1
    if purpose == "train" and coin < 0.5:
        x_0 = x_0.flip(2)
    noise = torch.randn(3, *x_0.shape[1:], generator=stream(seed, purpose, k, "noise"))
    return x_0, label, noise, z, u


def image_loss(model, x_0, y, noise, t, features=None):
    """Eq. (5) of one image, and with features REPA's loss: 1 - cosine, averaged over patches."""
    x_t = (1 - t) * x_0 + t * noise
    if features is None:
        v, repa = model(x_t[None], t[None], torch.tensor([y])), torch.zeros(())
    else:
        v, tokens = model(x_t[None], t[None], torch.tensor([y]), align=True)
        dot = (tokens[0] * features).sum(0)
        repa = (1 - dot / (tokens[0].norm(dim=0) * features.norm(dim=0))).mean()
    return ((v[0] - (noise - x_0)) ** 2).mean(), repa


def fit(model, data, order, options, stream, encoder=None, repa_weight=0.5):
    """The training of train.py, one image at a time: (average of the weights, lines of the log)."""
    weights = list(model.parameters())
    ema, adam, log = copy.deepcopy(model), torch.optim.Adam(weights), []
    for step in range(options.steps):
        total = flow_total = 0
        for k in range(step * options.batch_size, (step + 1) * options.batch_size):
            x_0, y, noise, z, u = example(data, order, k, options.seed, "train", stream)
            y = model.config.num_classes if u < options.label_dropout else y
            t = 1 / (1 + torch.exp(-(z + options.time_mean)))
            flow, repa = image_loss(model, x_0, y, noise, t, encoder and encoder(x_0[None])[0])
            total, flow_total = total + flow + repa_weight * repa, flow_total + flow.item()
        gradients = torch.autograd.grad(total / options.batch_size, weights)
        norm = math.sqrt(sum((g.double() ** 2).sum().item() for g in gradients))
        for weight, gradient in zip(weights, gradients):
            too_long = options.clip and norm > options.clip
            weight.grad = gradient * (options.clip / norm) if too_long else gradient
        lr = learning_rate(step, options.steps, options.lr, options.warmup, options.cooldown)
        adam.param_groups[0]["lr"] = lr
        adam.step()
        with torch.no_grad():
            decay = min(options.ema, (1 + step) / (10 + step))
            for average, weight in zip(ema.parameters(), weights):
                average.copy_(decay * average + (1 - decay) * weight)
        log.append(dict(step=step + 1, loss=flow_total / options.batch_size, lr=lr, grad_norm=norm))
    return ema, log


@torch.no_grad()
def validation_loss(model, data, order, stream):
    """The mean of Eq. (5) over all validation images, which are not flipped and keep their labels.
    Each image has its own fixed noise and time; logit t ~ N(0, 1)."""
    losses = []
    for k in range(len(data)):
        x_0, y, noise, z, _ = example(data, order, k, 0, "val", stream)
        losses.append(image_loss(model, x_0, y, noise, 1 / (1 + torch.exp(-z)))[0].item())
    return sum(losses) / len(losses)
