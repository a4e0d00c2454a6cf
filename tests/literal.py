"""The formulas of the paper, read literally: one image, one token, one pixel at a time.

Read them beside the paper.  They are slow on purpose, in numpy and float64, and share the names of
the weights with dip.py and nothing else.  The tests compare the fast code with these lines.

Shapes: an image is (3, H, W), a token is (D,), tokens are a list in row-major order.  w is a dict
of weights by name: `part(w, "blocks.0")` holds those of block 0, without that prefix.
"""

import cmath
import math

import numpy as np


def weights_of(module):
    """{name: float64 array} of everything in a module's state dict"""
    return {name: value.detach().double().numpy() for name, value in module.state_dict().items()}


def part(w, prefix):
    """The weights whose names begin with the prefix and a dot, by the rest of their names."""
    return {name[len(prefix) + 1:]: x for name, x in w.items() if name.startswith(prefix + ".")}


def count(w, prefix):
    """The number of layers prefix.0, prefix.1, ..."""
    return len({name.split(".")[0] for name in part(w, prefix)})


# --- patches --------------------------------------------------------------------------------------


def patch(image, P, n):
    """Patch n of an image: row n // (W / P), column n % (W / P) of the grid.  -> (3, P, P)"""
    channels, _, W = image.shape
    square = np.zeros((channels, P, P))
    for c in range(channels):
        for i in range(P):
            for j in range(P):
                square[c, i, j] = image[c, n // (W // P) * P + i, n % (W // P) * P + j]
    return square


def put_together(patches, H, W):
    """The image (3, H, W) of which these are the patches, pixel by pixel."""
    P = patches[0].shape[-1]
    image = np.zeros((len(patches[0]), H, W))
    for c, i, j in np.ndindex(image.shape):
        image[c, i, j] = patches[i // P * (W // P) + j // P][c, i % P, j % P]
    return image


# --- layers ---------------------------------------------------------------------------------------


def linear(w, x):
    """y_i = sum_j W_ij x_j + b_i"""
    return w["weight"] @ x + w.get("bias", 0)


def silu(z):
    """z times its own sigmoid"""
    return z / (1 + np.exp(-z))


def rms_norm(w, x):
    """x / sqrt(mean of x^2 + 1e-6), then one weight for each dimension"""
    return w["weight"] * x / math.sqrt(sum(value**2 for value in x) / len(x) + 1e-6)


def layer_norm(x):
    """(x - mean) / sqrt(variance + 1e-6), without weights"""
    return (x - x.mean()) / math.sqrt(((x - x.mean()) ** 2).mean() + 1e-6)


def mlp(w, layers, x):
    """Linear layers with SiLU between them; `layers` are their names."""
    for name in layers[:-1]:
        x = silu(linear(part(w, name), x))
    return linear(part(w, layers[-1]), x)


def swiglu(w, x):
    """W_out (silu(W_gate x) * W_value x)"""
    return linear(part(w, "out"), silu(linear(part(w, "gate"), x)) * linear(part(w, "value"), x))


def convolution(w, x):
    """3 x 3: output (i, j) is the sum over the window around (i, j); outside, the map is 0."""
    _, H, W = x.shape
    y = np.zeros((len(w["weight"]), H, W)) + w["bias"][:, None, None]
    for u in (-1, 0, 1):
        for v in (-1, 0, 1):
            weight = w["weight"][:, :, 1 + u, 1 + v].copy()
            for i, j in np.ndindex(H, W):
                if 0 <= i + u < H and 0 <= j + v < W:
                    y[:, i, j] += weight @ x[:, i + u, j + v]
    return y


def pointwise(w, x):
    """1 x 1 convolution: the same linear layer at every pixel"""
    layer = {"weight": w["weight"][:, :, 0, 0], "bias": w["bias"]}
    y = np.zeros((len(w["weight"]), *x.shape[1:]))
    for i, j in np.ndindex(x.shape[1:]):
        y[:, i, j] = linear(layer, x[:, i, j])
    return y


def transposed_convolution(w, x):
    """2 x 2, stride 2: pixel (i, j) is scattered over the square (2i, 2j) ... (2i + 1, 2j + 1)."""
    _, H, W = x.shape
    y = np.zeros((w["weight"].shape[1], 2 * H, 2 * W)) + w["bias"][:, None, None]
    for u, v in np.ndindex(2, 2):
        weight = w["weight"][:, :, u, v].T.copy()
        for i, j in np.ndindex(H, W):
            y[:, 2 * i + u, 2 * j + v] += weight @ x[:, i, j]
    return y


def max_pool(x):
    """The largest of every 2 x 2 square, channel by channel"""
    C, H, W = x.shape
    y = np.zeros((C, H // 2, W // 2))
    for c, i, j in np.ndindex(y.shape):
        y[c, i, j] = max(x[c, 2 * i + u, 2 * j + v] for u in (0, 1) for v in (0, 1))
    return y


# --- where: rotary positions ----------------------------------------------------------------------


def positions(rows, columns):
    """(row, column) of every token, each spread evenly over [0, 16]"""
    def spread(i, n):
        return 16 * i / (n - 1) if n > 1 else 0.0
    return [(spread(i, rows), spread(j, columns)) for i in range(rows) for j in range(columns)]


def turns(row, column, d):
    """Dimensions a and b of a query turn together by an angle: (a, b, angle), d/2 of them.

    Frequencies 10000^(-k / (d/4)); the first d/4 pairs turn by the row, the others by the column.
    """
    f = [10000 ** (-k / (d // 4)) for k in range(d // 4)]
    return [(k, k + d // 2, row * f[k]) for k in range(d // 4)] + [
        (k + d // 4, k + d // 4 + d // 2, column * f[k]) for k in range(d // 4)]


def rotated(x, turn):
    """(x_a, x_b) as the complex number x_a + i x_b, which e^(i angle) turns; d/2 of them"""
    return [complex(x[a], x[b]) * cmath.exp(1j * angle) for a, b, angle in turn]


# --- the transformer block ------------------------------------------------------------------------


def attention(w, num_heads, tokens, turns):
    """Head by head and token by token: answer_m = sum_n softmax_n(q_m . k_n / sqrt d) v_n."""
    D, N = len(tokens[0]), len(tokens)
    d = D // num_heads
    answers = [np.zeros(D) for _ in tokens]
    for head in range(num_heads):
        rows = slice(head * d, (head + 1) * d)           # this head's dimensions
        q, k, v = [], [], []
        for token, turn in zip(tokens, turns):
            query, key, value = np.split(w["qkv.weight"] @ token, 3)
            q.append(rotated(rms_norm(part(w, "q_norm"), query[rows]), turn))
            k.append(rotated(rms_norm(part(w, "k_norm"), key[rows]), turn))
            v.append(value[rows])
        for m in range(N):
            weights = []
            for n in range(N):                           # Re(q k*) is the product of the pairs
                product = sum((a * b.conjugate()).real for a, b in zip(q[m], k[n]))
                weights.append(math.exp(product / math.sqrt(d)))
            for n in range(N):
                answers[m][rows] += weights[n] / sum(weights) * v[n]
    return [linear(part(w, "out"), answer) for answer in answers]


def modulated(s, shift, scale):
    return s * (1 + scale) + shift


def block(w, num_heads, tokens, c, turns):
    """s + gate1 attention(norm1(s) (1 + scale1) + shift1), then the same with the MLP"""
    shift1, scale1, gate1, shift2, scale2, gate2 = np.split(linear(part(w, "adaLN"), c), 6)
    seen = [modulated(rms_norm(part(w, "norm1"), s), shift1, scale1) for s in tokens]
    answers = attention(part(w, "attention"), num_heads, seen, turns)
    tokens = [s + gate1 * answer for s, answer in zip(tokens, answers)]
    seen = [modulated(rms_norm(part(w, "norm2"), s), shift2, scale2) for s in tokens]
    return [s + gate2 * swiglu(part(w, "mlp"), x) for s, x in zip(tokens, seen)]


# --- heads: noisy pixels x (3, h, w) and their context s (D, h', w') to pixels (3, h, w) ----------


def unet(w, x, s):
    """Fig. 6: down with a skip at every stage, the token at the bottom, up with the skips."""
    stages, skips = count(w, "down"), []
    for k in range(stages):
        x = silu(convolution(part(w, f"down.{k}"), x))
        skips.append(x)
        x = max_pool(x)
    _, H, W = x.shape
    bottom = np.zeros((len(x) + len(s), H, W))
    for i, j in np.ndindex(H, W):                        # the token whose square (i, j) lies in
        token = s[:, i * s.shape[1] // H, j * s.shape[2] // W]
        bottom[:, i, j] = np.concatenate([x[:, i, j], token])
    x = silu(pointwise(part(w, "bottleneck"), bottom))
    for k in range(stages):
        x = transposed_convolution(part(w, f"up.{k}"), x)
        x = silu(convolution(part(w, f"merge.{k}"), np.concatenate([x, skips[stages - 1 - k]])))
    return pointwise(part(w, "out"), x)


def mlp_head(w, x, s):
    """The token, then the pixels channel by channel and row by row, as one vector"""
    h = np.concatenate([s[:, 0, 0], x.flatten()])
    return mlp(w, [f"layers.{k}" for k in range(count(w, "layers"))] + ["out"], h).reshape(x.shape)


def coordinate(w, x, s):
    """Each pixel alone: colour and position go through an MLP whose weights the token generates."""
    P, C, y = x.shape[-1], w["out.weight"].shape[1], np.zeros(x.shape)
    for i, j in np.ndindex(P, P):
        basis = [math.cos(math.pi * a * (i + 0.5) / P) * math.cos(math.pi * b * (j + 0.5) / P)
                 for a in range(8) for b in range(8)]
        h = linear(part(w, "embed"), np.concatenate([x[:, i, j], basis]))
        for k in range(count(w, "generators")):
            generated = linear(part(w, f"generators.{k}"), s[:, 0, 0])
            w1 = generated[:2 * C * C].reshape(C, 2 * C)
            w2 = generated[2 * C * C:].reshape(2 * C, C)
            w1 = w1 / np.sqrt((w1**2).sum(axis=0))       # every column has length 1
            w2 = w2 / np.sqrt((w2**2).sum(axis=0))
            h = h + silu(rms_norm(part(w, f"norms.{k}"), h) @ w1) @ w2
        y[:, i, j] = linear(part(w, "out"), rms_norm(part(w, "norm"), h))
    return y


def attention_head(w, x, s):
    """The backbone's block, with pixels as tokens and the patch's token as condition; d = 16"""
    P, d, y = x.shape[-1], 16, np.zeros(x.shape)
    h = [linear(part(w, "embed"), x[:, i, j]) for i, j in np.ndindex(P, P)]
    where = [turns(row, column, d) for row, column in positions(P, P)]
    for k in range(count(w, "blocks")):
        h = block(part(w, f"blocks.{k}"), len(h[0]) // d, h, s[:, 0, 0], where)
    for n, (i, j) in enumerate(np.ndindex(P, P)):
        y[:, i, j] = linear(part(w, "out"), rms_norm(part(w, "norm"), h[n]))
    return y


HEADS = {"unet": unet, "mlp": mlp_head, "coordinate": coordinate, "attention": attention_head}


# --- from tokens to pixels ------------------------------------------------------------------------


def patch_detailer(w, config, x_t, tokens, time):
    """The head sees silu(token + time): patch by patch, or the whole image with its token map."""
    _, H, W = x_t.shape
    P, head = config.patch_size, HEADS[config.head]
    context = [silu(s + time) for s in tokens]
    if config.head_input == "image":
        token_map = np.array(context).T.reshape(-1, H // P, W // P)
        return head(part(w, "head"), x_t, token_map)
    return put_together([head(part(w, "head"), patch(x_t, P, n), s[:, None, None])
                         for n, s in enumerate(context)], H, W)


def final_layer(w, config, x_t, tokens, c):
    """DiT's: LayerNorm, shift and scale, one linear layer from a token to 3PP pixel values"""
    P = config.patch_size
    shift, scale = np.split(linear(part(w, "adaLN"), c), 2)
    pixels = [linear(part(w, "linear"), modulated(layer_norm(s), shift, scale)) for s in tokens]
    return put_together([p.reshape(3, P, P) for p in pixels], *x_t.shape[1:])


# --- the network ----------------------------------------------------------------------------------


def time_features(t):
    """cos(w_k t), then sin(w_k t), w_k = 10^(-k/128), k = 0 ... 127"""
    angles = [10 ** (-k / 128) * t for k in range(128)]
    return np.array([math.cos(a) for a in angles] + [math.sin(a) for a in angles])


def condition(w, t, y):
    """(time (D,), c (D,)): how noisy, and how noisy with what"""
    time = mlp(part(w, "time"), ["mlp.0", "mlp.2"], time_features(t))
    return time, silu(time + w["label.weight"][y])


def embed(w, P, x_t):
    """Every patch, flattened channel by channel and row by row, to one token"""
    N = x_t.shape[1] // P * (x_t.shape[2] // P)
    return [linear(part(w, "embed"), patch(x_t, P, n).flatten()) for n in range(N)]


def dip(w, config, x_t, t, y):
    """Velocity (3, H, W) of one image, and the tokens that REPA aligns (a list, or None)."""
    P, (_, H, W) = config.patch_size, x_t.shape
    time, c = condition(w, t, y)
    tokens, aligned = embed(w, P, x_t), None
    where = [turns(row, column, config.hidden_size // config.num_heads)
             for row, column in positions(H // P, W // P)]
    for k in range(1, config.depth + 1):
        tokens = block(part(w, f"blocks.{k - 1}"), config.num_heads, tokens, c, where)
        if config.repa_dim and k == min(8, config.depth):        # three layers, SiLU between them
            aligned = [mlp(part(w, "repa_projector"), ["0", "2", "4"], s) for s in tokens]
        if config.placement != "post-hoc" and k == config.depth // 2:        # Fig. 5
            detail = patch_detailer(part(w, "inject_detail"), config, x_t, tokens, time)
            back = [linear(part(w, "inject_embed"), patch(detail, P, n).flatten())
                    for n in range(len(tokens))]
            tokens = [s + b for s, b in zip(tokens, back)]
    if config.head == "none" or config.placement == "intermediate":
        predicted = final_layer(part(w, "output"), config, x_t, tokens, c)
    else:
        predicted = patch_detailer(part(w, "output"), config, x_t, tokens, time)
    if config.prediction == "x":                         # x_t = x_0 + t v, t not below 0.05
        return (x_t - predicted) / max(t, 0.05), aligned
    return predicted, aligned


# --- the objective --------------------------------------------------------------------------------


def interpolate(x_0, noise, t):
    """Eq. (6): x_t = (1 - t) x_0 + t eps"""
    return (1 - t) * x_0 + t * noise


def flow_matching(v, x_0, noise):
    """Eq. (5) for one image: mean over its pixels of (v - (eps - x_0))^2"""
    return sum((v[p] - (noise[p] - x_0[p])) ** 2 for p in np.ndindex(v.shape)) / v.size


def resampled(features, rows, columns):
    """Features (d, h, w) on a grid of another size: a triangle as wide as the larger of the two
    spacings, around the place of each new point, its weights adding up to 1."""
    def weights(old, new):
        width = max(old / new, 1)
        table = np.zeros((new, old))
        for i in range(new):
            for k in range(old):
                table[i, k] = max(0, 1 - abs(k + 0.5 - (i + 0.5) * old / new) / width)
        return table / table.sum(axis=1, keepdims=True)
    down, across = weights(features.shape[1], rows), weights(features.shape[2], columns)
    new = np.zeros((len(features), rows, columns))
    for i, j, a, b in np.ndindex(rows, columns, *features.shape[1:]):
        new[:, i, j] += down[i, a] * across[j, b] * features[:, a, b]
    return new


def repa(tokens, features):
    """Mean over patches of 1 - cos(token, feature); tokens a list in row-major order, features
    (d, h, w) already on their grid"""
    total = 0
    for n, token in enumerate(tokens):
        feature = features[:, n // features.shape[2], n % features.shape[2]]
        total += 1 - token @ feature / (math.sqrt(token @ token) * math.sqrt(feature @ feature))
    return total / len(tokens)
