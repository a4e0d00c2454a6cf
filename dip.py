"""
DiP: Taming Diffusion Models in Pixel Space.  The network, its loss and its presets.

A diffusion transformer (DiT) cuts the noisy image into large patches.  Each patch becomes one
token, and attention between tokens decides what goes where.  A small Patch Detailer Head then looks
at each noisy patch again, pixel by pixel, together with its token, and adds the detail that one
token is too coarse to carry (Sec. 3.3, Fig. 6).

    x_t (B, 3, H, W) --> patchify --> (B, N, 3, P, P) -------------.
                                            |                      |  noisy pixels
                                          embed                    |
                                            |                      v
                                  s (B, N, D) --> [L blocks] --> head --> unpatchify --> v
                                                      ^            ^
    t, y --> embed --> c (B, D) ----------------------'            |  time, but no label
                                                                   |
    t ----> embed -------------------------------------------------'

    blocks: every patch attends to every other.   head: each patch alone (by default).

Conventions:
    * Images are float (B, 3, H, W) in [-1, 1].  Labels are int64 (B,).  Label `num_classes` is the
      null class, "no label", which classifier-free guidance needs.
    * Eq. (6): x_t = (1 - t) x_0 + t eps.  t = 0 is data, t = 1 is noise; t is float (B,) in [0, 1].
    * The model returns the velocity v = d x_t / dt = eps - x_0 of Eq. (5); Sec. 3.3 calls it the
      noise.  Sampling (sample.py) goes from t = 1 down to t = 0.
    * Patches are in row-major order.  H and W may differ; both must be multiples of P.
    * Letters: B images, H W pixels, P patch side, N = (H/P)(W/P) patches, L blocks, D token width,
      s tokens, c condition, d = D / num_heads.  In a head: M inputs (B N patches, or B images), C
      channels, and s is the context, SiLU(token + time).

The default network is the one the authors released (github.com/NJU-PCALab/DiP); `from_release`
converts their weights.  Equations, tables and sections are those of the paper (arXiv 2511.18822).
`# unspecified [name]:` marks a choice that the paper leaves open, `# differs [name]:` a departure
from its text.  The README lists both, with reasons.
"""

import dataclasses
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

# -------------------------------------------------------------------------------------------------
# Configuration


@dataclass(frozen=True)
class DiPConfig:
    """The network, and the image size it is trained at.  The defaults are DiP-XL/16 (Table 4)."""

    image_size: int = 256        # H = W in training; sampling takes any rectangle
    patch_size: int = 16         # P
    hidden_size: int = 1152      # D
    depth: int = 26              # L, transformer blocks
    num_heads: int = 16          # attention heads per block
    num_classes: int = 1000
    head: str = "unet"           # Table 2: a name in HEADS; "none" is DiT-only
    head_width: int = 0          # Fig. 10a: channels C; 0 = the head's own default
    head_depth: int = 0          # Fig. 10a: U-Net stages, or layers; 0 = the head's own default
    head_input: str = "patch"    # Fig. 11: patch or image
    placement: str = "post-hoc"  # Fig. 5: post-hoc, intermediate or hybrid
    prediction: str = "v"        # what the last layer outputs: velocity v or clean image x
    repa_dim: int = 0            # REPA: width of the encoder's features; 0 = no REPA

    def __post_init__(self):
        check(self)

    def replace(self, **changes):
        """A copy with some fields changed.  Raises ValueError if the result is illegal."""
        return dataclasses.replace(self, **changes)


# -------------------------------------------------------------------------------------------------
# Patches: two functions, each the inverse of the other


def patchify(x, P):
    """Cut images into squares, row by row.  x (B, 3, H, W) -> (B, N, 3, P, P)

    Raises ValueError unless H and W are multiples of P.
    """
    B, channels, H, W = x.shape
    check_multiple("image height", H, P, "patch_size")
    check_multiple("image width", W, P, "patch_size")
    x = x.reshape(B, channels, H // P, P, W // P, P)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(B, -1, channels, P, P)


def unpatchify(patches, size):
    """Put the squares back.  patches (B, N, 3, P, P), size (H, W) -> (B, 3, H, W)"""
    B, _, channels, P, _ = patches.shape
    H, W = size
    x = patches.reshape(B, H // P, W // P, channels, P, P)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(B, channels, H, W)


# -------------------------------------------------------------------------------------------------
# Embeddings of time and of position


def time_frequencies(device=None, dtype=torch.float32):
    """w_k = 10^(-k/128), from 1 down to about 0.1; DiT's begin at 1000.  -> (128,)"""
    # unspecified [time embedding]: as in the release and in DDT
    return 10 ** (-torch.arange(128, device=device, dtype=dtype) / 128)


class TimeEmbedding(nn.Module):
    """t as 128 cosines and 128 sines of different frequencies, then an MLP."""

    def __init__(self, D):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))

    def forward(self, t):
        """t (B,) -> (B, D)"""
        angles = t.float()[:, None] * time_frequencies(t.device)     # (B, 128)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))


def rope_angles(rows, columns, d, device=None):
    """Rotary angles of a grid of tokens: d/4 from the row, d/4 from the column.  -> (N, d/2)"""
    # unspecified [positions]: as in the release, rows and columns run from 0 to 16 at every size
    frequencies = 10000 ** (-torch.arange(d // 4, device=device) / (d // 4))
    row, column = torch.meshgrid(torch.linspace(0, 16, rows, device=device),
                                 torch.linspace(0, 16, columns, device=device), indexing="ij")
    return torch.cat([row.flatten()[:, None] * frequencies,              # (N, d/4)
                      column.flatten()[:, None] * frequencies], dim=1)   # (N, d/4)


def rotate(x, rope):
    """Turn each pair (x_i, x_{i + d/2}) by its angle.  x (..., N, d), rope = cos, sin (N, d/2) each
    -> (..., N, d)"""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


# -------------------------------------------------------------------------------------------------
# The transformer block of DDT (Sec. 4.1).  DDT's split into encoder and decoder is not used.


class Attention(nn.Module):
    """Self-attention over tokens.  Queries and keys are normalised, then rotated by position."""

    def __init__(self, D, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.q_norm = nn.RMSNorm(D // num_heads, eps=1e-6)   # eps: the release
        self.k_norm = nn.RMSNorm(D // num_heads, eps=1e-6)
        self.out = nn.Linear(D, D)

    def forward(self, s, rope):
        """s (B, N, D), rope = cos, sin (N, d/2) -> (B, N, D)    with d = D / num_heads"""
        q, k, v = self.qkv(s).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q = rotate(self.q_norm(q.float()), rope).type_as(v)  # (B, heads, N, d), as k and v
        k = rotate(self.k_norm(k.float()), rope).type_as(v)  # norms and rotations in float32
        mixed = F.scaled_dot_product_attention(q, k, v)      # (B, heads, N, d)
        return self.out(mixed.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """Gated MLP of hidden width 8D/3: as many parameters as a plain MLP of width 4D."""

    def __init__(self, D):
        super().__init__()
        hidden = 8 * D // 3
        self.gate = nn.Linear(D, hidden, bias=False)
        self.value = nn.Linear(D, hidden, bias=False)
        self.out = nn.Linear(hidden, D, bias=False)

    def forward(self, s):
        """s (B, N, D) -> (B, N, D)"""
        return self.out(F.silu(self.gate(s)) * self.value(s))


def modulate(s, shift, scale):
    """s (B, N, D), shift and scale (B, D) -> (B, N, D)"""
    return s * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """Attention, then SwiGLU.  The condition shifts, scales and gates each of them (adaLN)."""

    def __init__(self, D, num_heads, condition_dim):
        super().__init__()
        self.norm1 = nn.RMSNorm(D, eps=1e-6)
        self.attention = Attention(D, num_heads)
        self.norm2 = nn.RMSNorm(D, eps=1e-6)
        self.mlp = SwiGLU(D)
        self.adaLN = nn.Linear(condition_dim, 6 * D)

    def forward(self, s, c, rope):
        """s (B, N, D), c (B, condition_dim), SiLU applied, rope as above -> (B, N, D)"""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN(c).chunk(6, dim=-1)    # (B, D)
        s = s + gate1[:, None] * self.attention(modulate(self.norm1(s), shift1, scale1), rope)
        s = s + gate2[:, None] * self.mlp(modulate(self.norm2(s), shift2, scale2))
        return s


# -------------------------------------------------------------------------------------------------
# Patch Detailer Heads (Sec. 3.4, Table 2).  A head predicts every pixel from the noisy pixels x and
# their context s = SiLU(token + time):
#
#     head(x (M, 3, h, w), s (M, D, h', w')) -> (M, 3, h, w)
#
# Patch input: M = B N patches of P x P pixels, each with its own context (h' = w' = 1).  Image
# input: M = B images, each with a map of contexts.  To add a head, write a class like these that
# initialises itself, and add it to HEADS.  WIDTH and DEPTH are its defaults.


def in_float32(layer, x):
    """Run a last layer in float32, even under autocast.  With prediction="x" its output is divided
    by t, which would magnify the rounding of bfloat16."""
    with torch.autocast(x.device.type, enabled=False):
        return layer(x.float())


def he_normal_(head):
    """Every weight He normal, every bias 0."""
    # unspecified [head initialisation]: chosen on our small models; the release has PyTorch's
    for parameter in head.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter, nonlinearity="relu")
        else:
            nn.init.zeros_(parameter)


class UNetHead(nn.Module):
    """Convolutional U-Net (Fig. 6, Table 4).  A patch of 16 x 16 shrinks to 1 x 1, where it meets
    its token, and grows back.  Other patch sizes, depths or inputs may end wider than 1 x 1."""

    WIDTH, DEPTH = 64, 4                     # Table 4: channels of the first stage, stages

    def __init__(self, config):
        super().__init__()
        C, D = config.head_width or self.WIDTH, config.hidden_size
        down = [C * 2**i for i in range(config.head_depth or self.DEPTH)]
        up = down[::-1]
        inputs, outputs = [3, *down[:-1]], [*up[1:], C]
        self.down = nn.ModuleList(           # 3 -> 64 -> 128 -> 256 -> 512, each then pooled
            nn.Conv2d(i, o, 3, padding=1) for i, o in zip(inputs, down))
        self.pool = nn.MaxPool2d(2)          # unspecified [pooling]: as in the release
        # differs [bottleneck]: 1 x 1 as in the release; Sec. 4.1 says kernel 3
        self.bottleneck = nn.Conv2d(down[-1] + D, down[-1], 1)           # 512 + D -> 512
        self.up = nn.ModuleList(             # 512 -> 512, 256 -> 256, 128 -> 128, 64 -> 64
            nn.ConvTranspose2d(c, c, 2, stride=2) for c in up)
        self.merge = nn.ModuleList(          # with the skips: 2 x 512 -> 256, 2 x 256 -> 128, ...
            nn.Conv2d(2 * c, o, 3, padding=1) for c, o in zip(up, outputs))
        self.out = nn.Conv2d(C, 3, 1)
        he_normal_(self)
        for layer in self.up:                # start as nearest-neighbour upsampling
            layer.weight.data.copy_(torch.eye(len(layer.weight))[:, :, None, None])

    def forward(self, x, s):
        """x (M, 3, h, w), s (M, D, h', w') -> (M, 3, h, w);  shapes below: Table 4, h = w = 16"""
        x = x.contiguous(memory_format=torch.channels_last)  # faster convolutions on a CPU
        skips = []
        for conv in self.down:
            x = F.silu(conv(x))
            skips.append(x)                                  # (M, 64, 16, 16) ... (M, 512, 2, 2)
            x = self.pool(x)                                 # (M, 64,  8,  8) ... (M, 512, 1, 1)
        s = F.interpolate(s, size=x.shape[-2:], mode="nearest")      # (M, D, 1, 1)
        x = F.silu(self.bottleneck(torch.cat([x, s.type_as(x)], dim=1)))     # (M, 512, 1, 1)
        for up, merge in zip(self.up, self.merge):
            x = torch.cat([up(x), skips.pop()], dim=1)       # (M, 1024, 2, 2) ... (M, 128, 16, 16)
            x = F.silu(merge(x))                             # (M,  256, 2, 2) ... (M,  64, 16, 16)
        return in_float32(self.out, x)                       # (M, 3, 16, 16)


class MLPHead(nn.Module):
    """MLP on the token and the flattened patch.  It does not know which pixels are neighbours."""

    WIDTH, DEPTH = 1280, 2                   # unspecified [MLP head]: they give Table 2's 630 M

    def __init__(self, config):
        super().__init__()
        pixels = 3 * config.patch_size**2
        hidden = [config.head_width or self.WIDTH] * (config.head_depth or self.DEPTH)
        widths = [config.hidden_size + pixels, *hidden]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in zip(widths, hidden))
        self.out = nn.Linear(hidden[-1], pixels)
        he_normal_(self)

    def forward(self, x, s):
        """x (M, 3, P, P), s (M, D, 1, 1) -> (M, 3, P, P)"""
        z = torch.cat([s.flatten(1), x.flatten(1)], dim=1)   # (M, D + 3PP)
        for layer in self.layers:
            z = F.silu(layer(z))                             # (M, C)
        return in_float32(self.out, z).view(x.shape)


def cosine_basis(P, device=None):
    """The 8 x 8 lowest DCT-II frequencies at each pixel of a patch, in row-major order: (PP, 64)"""
    position = (torch.arange(P, device=device) + 0.5) / P
    cosines = torch.cos(math.pi * position[:, None] * torch.arange(8, device=device))    # (P, 8)
    return torch.einsum("ia,jb->ijab", cosines, cosines).reshape(P * P, 64)


class CoordinateHead(nn.Module):
    """Coordinate MLP, after PixNerd (arXiv 2507.23268): a hypernetwork.  The token generates the
    weights of a small residual MLP, which runs on each pixel's colour and position."""

    WIDTH, DEPTH = 64, 4                     # PixNerd's width; four blocks give Table 2's 700 M

    def __init__(self, config):
        super().__init__()
        C, depth = config.head_width or self.WIDTH, config.head_depth or self.DEPTH
        self.embed = nn.Linear(3 + 64, C)
        self.norms = nn.ModuleList(nn.RMSNorm(C, eps=1e-6) for _ in range(depth))
        # unspecified [coordinate head]: PixNerd's cosines as coordinates, no generated biases
        self.generators = nn.ModuleList(nn.Linear(config.hidden_size, 4 * C * C, bias=False)
                                        for _ in range(depth))
        self.norm = nn.RMSNorm(C, eps=1e-6)
        self.out = nn.Linear(C, 3)

    def forward(self, x, s):
        """x (M, 3, P, P), s (M, D, 1, 1) -> (M, 3, P, P)"""
        M, C = len(x), self.out.in_features
        basis = cosine_basis(x.shape[-1], x.device).expand(M, -1, -1)        # (M, PP, 64)
        colour = x.flatten(2).transpose(1, 2)                                # (M, PP, 3)
        z = self.embed(torch.cat([colour, basis], dim=2)).float()            # (M, PP, C)
        for norm, generator in zip(self.norms, self.generators):
            w1, w2 = generator(s.flatten(1)).float().chunk(2, dim=1)         # (M, 2CC) each
            w1 = F.normalize(w1.view(M, C, 2 * C), dim=1)                    # columns of length 1
            w2 = F.normalize(w2.view(M, 2 * C, C), dim=1)
            z = z + F.silu(norm(z) @ w1) @ w2                                # (M, PP, C)
        return in_float32(self.out, self.norm(z)).transpose(1, 2).reshape(x.shape)


class AttentionHead(nn.Module):
    """Attention inside a patch: the backbone's block, with the patch's pixels as tokens and its
    token as condition."""

    WIDTH, DEPTH = 64, 10                    # unspecified [attention head]: Table 2's 630 M
    HEAD_DIM = 16                            # d

    def __init__(self, config):
        super().__init__()
        C, depth = config.head_width or self.WIDTH, config.head_depth or self.DEPTH
        self.embed = nn.Linear(3, C)
        self.blocks = nn.ModuleList(Block(C, C // self.HEAD_DIM, config.hidden_size)
                                    for _ in range(depth))
        self.norm = nn.RMSNorm(C, eps=1e-6)
        self.out = nn.Linear(C, 3)

    def forward(self, x, s):
        """x (M, 3, P, P), s (M, D, 1, 1) -> (M, 3, P, P)"""
        angles = rope_angles(*x.shape[-2:], self.HEAD_DIM, x.device)         # (PP, 8)
        rope = angles.cos(), angles.sin()
        z = self.embed(x.flatten(2).transpose(1, 2)).float()                 # (M, PP, C)
        for block in self.blocks:
            z = block(z, s.flatten(1), rope)
        return in_float32(self.out, self.norm(z)).transpose(1, 2).reshape(x.shape)


HEADS = {"unet": UNetHead, "mlp": MLPHead, "coordinate": CoordinateHead, "attention": AttentionHead}

# -------------------------------------------------------------------------------------------------
# From tokens to pixels, with a head or with DiT's own last layer.  Either can take the other's
# place, so both receive the noisy image, the tokens, the time embedding and the condition.


class PatchDetailerHead(nn.Module):
    """Runs one of HEADS on each noisy patch with its context, or on the whole image (Fig. 11)."""

    def __init__(self, config):
        super().__init__()
        self.P = config.patch_size
        self.head_input = config.head_input
        self.head = HEADS[config.head](config)

    def forward(self, x_t, s, time, c):
        """x_t (B, 3, H, W), s (B, N, D), time (B, D) -> (B, 3, H, W)"""
        H, W = x_t.shape[-2:]
        # unspecified [context]: as in the release, without the label
        context = F.silu(s + time[:, None])                                  # (B, N, D)
        if self.head_input == "image":
            size = H // self.P, W // self.P
            return self.head(x_t, context.transpose(1, 2).unflatten(2, size))
        patches = patchify(x_t, self.P)                                      # (B, N, 3, P, P)
        pixels = self.head(patches.flatten(0, 1), context.flatten(0, 1)[:, :, None, None])
        return unpatchify(pixels.unflatten(0, patches.shape[:2]), (H, W))


class FinalLayer(nn.Module):
    """DiT's last layer: a linear map from each token to the 3PP pixel values of its patch."""

    def __init__(self, config):
        super().__init__()
        D = config.hidden_size
        self.P = config.patch_size
        self.norm = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
        self.adaLN = nn.Linear(D, 2 * D)
        self.linear = nn.Linear(D, 3 * self.P**2)

    def forward(self, x_t, s, time, c):
        """x_t (B, 3, H, W), only for its size, s (B, N, D), c (B, D) -> (B, 3, H, W)"""
        shift, scale = self.adaLN(c).chunk(2, dim=-1)
        pixels = in_float32(self.linear, modulate(self.norm(s), shift, scale))   # (B, N, 3PP)
        return unpatchify(pixels.unflatten(2, (3, self.P, self.P)), x_t.shape[-2:])


# -------------------------------------------------------------------------------------------------
# The model

REPA_BLOCK = 8           # the release: REPA aligns the tokens after this block
REPA_WEIGHT = 0.5        # the release: loss = flow + REPA_WEIGHT * repa
MIN_TIME = 0.05          # prediction="x", after JiT (2511.13720): v = (x_t - x) / max(t, MIN_TIME)


class DiP(nn.Module):
    """Velocity field of Eq. (5): a DiT over patches, refined by a Patch Detailer Head.

    | tensor                                  | initialisation                                |
    |-----------------------------------------|-----------------------------------------------|
    | patch embedding                         | Xavier uniform, bias 0 (release)              |
    | label table, both layers of time's MLP  | weights normal, std 0.02 (release)            |
    | U-Net and MLP heads, last layers too    | He normal, bias 0                             |
    | the U-Net's transposed convolutions     | 1 on the diagonal: nearest upsampling, bias 0 |
    | inject_embed, from detail to tokens     | 0: at first, an injection adds nothing        |
    | everything else, adaLN too, unlike DiT  | PyTorch's default (release)                   |
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        D, P = config.hidden_size, config.patch_size
        self.embed = nn.Linear(3 * P * P, D)
        self.time = TimeEmbedding(D)
        self.label = nn.Embedding(config.num_classes + 1, D)         # last row: the null class
        self.blocks = nn.ModuleList(Block(D, config.num_heads, D) for _ in range(config.depth))
        # Fig. 5: the head after the last block (post-hoc), between two blocks, or both (hybrid)
        ends_in_head = config.head != "none" and config.placement != "intermediate"
        self.output = PatchDetailerHead(config) if ends_in_head else FinalLayer(config)
        self.inject_after = None
        if config.placement != "post-hoc":
            self.inject_after = config.depth // 2            # unspecified [placement]
            self.inject_detail = PatchDetailerHead(config)
            self.inject_embed = nn.Linear(3 * P * P, D)      # "projected back" (Sec. 3.4)
        self.repa_after = min(REPA_BLOCK, config.depth)
        if config.repa_dim:
            self.repa_projector = nn.Sequential(             # unspecified [REPA]: as in the release
                nn.Linear(D, D), nn.SiLU(), nn.Linear(D, D), nn.SiLU(),
                nn.Linear(D, config.repa_dim))
        # initialisation
        nn.init.xavier_uniform_(self.embed.weight)
        nn.init.zeros_(self.embed.bias)
        for weight in (self.label.weight, self.time.mlp[0].weight, self.time.mlp[2].weight):
            nn.init.normal_(weight, std=0.02)
        if self.inject_after is not None:
            nn.init.zeros_(self.inject_embed.weight)
            nn.init.zeros_(self.inject_embed.bias)

    def forward(self, x_t, t, y, align=False):
        """Velocity of every pixel (Eq. 5).  x_t (B, 3, H, W), t (B,), y (B,) -> (B, 3, H, W)

        align=True also returns the projected tokens (B, repa_dim, H/P, W/P), for REPA.
        """
        P, D, num_heads = self.config.patch_size, self.config.hidden_size, self.config.num_heads
        patches = patchify(x_t, P)                               # (B, N, 3, P, P)
        rows, columns = x_t.shape[-2] // P, x_t.shape[-1] // P
        angles = rope_angles(rows, columns, D // num_heads, x_t.device)
        rope = angles.cos(), angles.sin()                        # (N, d/2) each
        time = self.time(t)                                      # (B, D)       noise level
        c = F.silu(time + self.label(y))                         # (B, D)       ... and class
        s = self.embed(patches.flatten(2)).float()               # (B, N, D)    stays float32
        for i, block in enumerate(self.blocks, start=1):
            s = block(s, c, rope)                                # (B, N, D)    across all patches
            if align and i == self.repa_after:
                tokens = self.repa_projector(s).transpose(1, 2).unflatten(2, (rows, columns))
            if i == self.inject_after:
                detail = self.inject_detail(x_t, s, time, c)     # (B, 3, H, W)
                s = s + self.inject_embed(patchify(detail, P).flatten(2))
        predicted = self.output(x_t, s, time, c)                 # (B, 3, H, W)
        if self.config.prediction == "v":
            v = predicted
        else:                                                    # a clean image: x_t - x_0 = t v
            v = (x_t - predicted) / t.clamp(min=MIN_TIME)[:, None, None, None]
        return (v, tokens) if align else v


# -------------------------------------------------------------------------------------------------
# Flow matching


def interpolate(x_0, noise, t):
    """Eq. (6): x_t = (1 - t) x_0 + t eps.  x_0, noise (B, 3, H, W), t (B,) -> (B, 3, H, W)"""
    t = t[:, None, None, None]
    return (1 - t) * x_0 + t * noise


def logit_normal_time(z, mean=0.0, std=1.0):
    """Turn z ~ N(0, 1) into t in (0, 1) whose logit is N(mean, std^2).  (B,) -> (B,)"""
    return torch.sigmoid(mean + std * z)     # unspecified [distribution of t]: release


def drop_labels(y, u, num_classes, rate=0.1):
    """Replace a fraction `rate` of the labels by the null class, so that the network also learns
    the velocity without a label, for guidance.  y (B,), u ~ U(0, 1) (B,) -> (B,)"""
    return torch.where(u < rate, num_classes, y)     # unspecified [label dropout]: release


def flow_matching_loss(model, x_0, y, t, noise, features=None):
    """Eq. (5) and REPA's alignment loss, one value per image: (flow, repa), each (B,).

        flow = mean over pixels and channels of (v_theta(x_t, t, y) - (eps - x_0))^2
        repa = mean over patches of 1 - cos(projected token, feature),  0 without features

    x_0, noise (B, 3, H, W), y (B,), t (B,).  features (B, repa_dim, h, w): patch features of a
    frozen encoder, resampled here to the model's grid.  Train on flow + REPA_WEIGHT * repa.
    """
    x_t, target = interpolate(x_0, noise, t), noise - x_0            # (B, 3, H, W) each
    if features is None:
        v, repa = model(x_t, t, y), x_0.new_zeros(len(x_0))
    else:
        v, tokens = model(x_t, t, y, align=True)                     # (B, repa_dim, H/P, W/P)
        features = F.interpolate(features.float(), tokens.shape[-2:], mode="bilinear",
                                 antialias=True)
        repa = 1 - F.cosine_similarity(tokens.float(), features, dim=1).mean(dim=(1, 2))
    return (v - target).square().mean(dim=(1, 2, 3)), repa


# -------------------------------------------------------------------------------------------------
# The authors' weights: the same network in other conventions

RELEASE_NAMES = {                                # theirs: ours, applied in this order
    "s_embedder.proj": "embed", "t_embedder": "time", "y_embedder.embedding_table": "label",
    "attn.proj": "attention.out", "attn": "attention", "adaLN_modulation.0": "adaLN",
    "mlp.w1": "mlp.gate", "mlp.w3": "mlp.value", "mlp.w2": "mlp.out",
    "local_decoder": "output.head", "bottleneck.0": "bottleneck", "out_conv": "out",
    **{f"enc{i}.0": f"down.{i - 1}" for i in range(1, 5)},
    **{f"up{i}": f"up.{4 - i}" for i in range(1, 5)},
    **{f"dec{i}.0": f"merge.{4 - i}" for i in range(1, 5)},
}


def from_release(weights):
    """Convert the authors' state dict to (DiPConfig, state dict of a DiP with the same velocity).

    1. Their names differ: RELEASE_NAMES.
    2. Their time is t' = 1 - t.  Since cos w(1-t) = cos w cos wt + sin w sin wt and
       sin w(1-t) = sin w cos wt - cos w sin wt, the first layer of the time MLP absorbs this.
    3. Their velocity points from noise to data, so we negate the last layer.
    4. They rotate neighbouring pairs (2j, 2j + 1), column and row in turn; we rotate the pairs
       (i, i + d/2), rows first.  So we reorder the dimensions of queries and keys.

    Raises KeyError, ValueError or another error if the weights are not theirs.
    """
    if "embed.weight" in weights:            # converted once more, they would give -v
        raise ValueError("its names are those of dip.py, but it has no configuration; use a "
                         "checkpoint of train.py, or what sample.py --save-weights makes of one")
    ours = {}
    for name, weight in weights.items():
        for old, new in RELEASE_NAMES.items():
            name = name.replace(old, new)
        ours[name] = weight
    D, pixels = ours["embed.weight"].shape
    P, d = math.isqrt(pixels // 3), len(ours["blocks.0.attention.q_norm.weight"])
    # the weights do not say the image size: assume 16 x 16 patches, as in the paper
    config = DiPConfig(image_size=16 * P, patch_size=P, hidden_size=D, num_heads=D // d,
                       depth=len({name.split(".")[1] for name in ours if "blocks." in name}),
                       num_classes=len(ours["label.weight"]) - 1,
                       head_width=ours["output.head.out.weight"].shape[1])

    w = time_frequencies(dtype=torch.float64)
    cosine, sine = ours["time.mlp.0.weight"].double().chunk(2, dim=1)        # (D, 128) each
    rotated = cosine * w.cos() + sine * w.sin(), cosine * w.sin() - sine * w.cos()
    ours["time.mlp.0.weight"] = torch.cat(rotated, dim=1).float()
    for name in ("output.head.out.weight", "output.head.out.bias"):
        ours[name] = -ours[name]
    # for d = 8, with (a, b) the two dimensions that are rotated together:
    #     ours       row a   column a   row b   column b
    #     theirs     2 6     0 4        3 7     1 5
    order = torch.arange(d).view(d // 4, 4)[:, [2, 0, 3, 1]].T.flatten()     # (d,)
    for name, weight in ours.items():
        if "q_norm" in name or "k_norm" in name:
            if len(weight) != d:
                raise ValueError(f"{name} has {len(weight)} values, the first q_norm {d}")
            ours[name] = weight[order]
        if "attention.qkv" in name:
            q, k, v = weight.unflatten(0, (3, D // d, d))                    # (heads, d, D) each
            ours[name] = torch.cat([q[:, order], k[:, order], v]).flatten(0, 1)
    return config, ours


# -------------------------------------------------------------------------------------------------
# Which configurations are legal


def check_choice(field, value, choices):
    """Raise ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{field}={value!r} is not one of: {', '.join(map(str, choices))}")


def check_multiple(field, value, divisor, divisor_name):
    """Raise ValueError, with the nearest legal values, unless value = divisor, 2 divisor, ..."""
    if value % divisor or value < divisor:
        below = max(0, value // divisor * divisor)
        fits = ", ".join(str(n) for n in (below, below + divisor) if n > 0)
        raise ValueError(f"{field}={value} is not a multiple of {divisor_name}={divisor}; "
                         f"nearest that fit: {fits}")


def check(config):
    """Raise ValueError, in one line, if the configuration cannot be built or run."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        least = 0 if field.name in ("head_width", "head_depth", "repa_dim") else 1
        if field.type is int and (type(value) is not int or value < least):
            raise ValueError(f"{field.name}={value!r} must be a whole number, at least {least}")
    check_choice("head", config.head, ("none", *HEADS))
    check_choice("head_input", config.head_input, ("patch", "image"))
    check_choice("placement", config.placement, ("post-hoc", "intermediate", "hybrid"))
    check_choice("prediction", config.prediction, ("v", "x"))
    check_multiple("image_size", config.image_size, config.patch_size, "patch_size")
    check_multiple("hidden_size", config.hidden_size, 4 * config.num_heads,
                   "4 * num_heads")          # half of the rotary pairs for rows, half for columns
    if config.head == "unet":
        stages = config.head_depth or UNetHead.DEPTH
        check_multiple("patch_size", config.patch_size, 2**stages, f"2 ** {stages} (head_depth)")
    if config.head == "attention":
        width, d = config.head_width or AttentionHead.WIDTH, AttentionHead.HEAD_DIM
        check_multiple("head_width", width, d, "AttentionHead.HEAD_DIM")
    if config.head == "none" and (config.head_width or config.head_depth):
        raise ValueError(f"head='none' takes no head_width={config.head_width} or "
                         f"head_depth={config.head_depth}; leave them 0, or choose a head")
    if config.head_input == "image" and config.head != "unet":
        raise ValueError(f"head_input='image' needs head='unet', not head={config.head!r}")
    if config.placement != "post-hoc" and (config.head == "none" or config.depth < 2):
        raise ValueError(f"placement={config.placement!r} needs a head and depth >= 2; "
                         f"head={config.head!r}, depth={config.depth}")


# -------------------------------------------------------------------------------------------------
# Presets.  The README lists their sizes and costs.

XL = DiPConfig()
PRESETS = {
    # Table 2, the DiT-only baselines
    "DiT-XL/16": XL.replace(head="none"),
    "DiT-XL-deep/16": XL.replace(head="none", depth=32),
    "DiT-XL-1280/16": XL.replace(head="none", hidden_size=1280),
    "DiT-XL-1536/16": XL.replace(head="none", hidden_size=1536),
    # Table 2, the heads; Table 3, 512 x 512
    "DiP-XL/16": XL,
    "DiP-XL/16-mlp": XL.replace(head="mlp"),
    "DiP-XL/16-coordinate": XL.replace(head="coordinate"),
    "DiP-XL/16-attention": XL.replace(head="attention"),
    "DiP-XL/32": XL.replace(image_size=512, patch_size=32),
    "DiP-L/16": XL.replace(hidden_size=1024, depth=22),      # also released
    # smaller: the sizes of ViT-B, -S and -Ti, with narrower heads
    "DiP-B/16": XL.replace(hidden_size=768, depth=12, num_heads=12, head_width=32),
    "DiP-S/16": XL.replace(hidden_size=384, depth=12, num_heads=6, head_width=16),
    "DiP-Ti/16": XL.replace(hidden_size=192, depth=12, num_heads=3, head_width=8),
    # for a CPU
    # differs [Nano predicts x]: the clean image, which is better where tokens are narrow (JiT)
    "DiP-Nano/8": XL.replace(image_size=48, patch_size=8, hidden_size=128, depth=6, num_heads=4,
                             num_classes=10, head_width=16, head_depth=3, prediction="x"),
}
