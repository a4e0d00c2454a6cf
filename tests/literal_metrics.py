"""
The metrics of fid.py read literally: numpy and loops, one function a definition, nothing shared.

Slow on purpose.  Read a function beside the definition in its docstring, then fid.py's beside both:
tests/test_08_fid.py demands that they agree.
"""

import math

import numpy as np

# --- statistics and the Frechet distance --------------------------------------------------------


def mean(points):
    """mu_a = (1 / n) sum_i x_ia"""
    n, d = points.shape
    return np.array([sum(points[i, a] for i in range(n)) / n for a in range(d)])


def covariance(points):
    """S_ab = (1 / (n - 1)) sum_i (x_ia - mu_a) (x_ib - mu_b)"""
    n, d = points.shape
    mu = mean(points)
    return np.array([[sum((points[i, a] - mu[a]) * (points[i, b] - mu[b]) for i in range(n))
                      / (n - 1) for b in range(d)] for a in range(d)])


def matrix_root(S):
    """The symmetric R with R R = S: S = sum_k l_k v_k v_k^T gives R = sum_k sqrt(l_k) v_k v_k^T."""
    R = np.zeros_like(S)
    for value, vector in zip(*(part.T for part in np.linalg.eigh(S))):
        R += math.sqrt(max(value, 0)) * np.outer(vector, vector)
    return R


def frechet(mu1, S1, mu2, S2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), the distance of Dowson and Landau (1982).

    With R_i = S_i^(1/2), the product S1 S2 is similar to (R1 R2) (R1 R2)^T.  The trace of its root
    is therefore the sum of the singular values of R1 R2.
    """
    root = np.linalg.svd(matrix_root(S1) @ matrix_root(S2), compute_uv=False).sum()
    return sum((mu1 - mu2) ** 2) + np.trace(S1) + np.trace(S2) - 2 * root


# --- Inception Score ----------------------------------------------------------------------------


def inception_score(probabilities, split):
    """Mean over chunks of `split` rows of exp( (1 / n) sum_i sum_c p_ic log(p_ic / q_c) ), where
    q_c = (1 / n) sum_i p_ic is over the same chunk, and 0 log 0 = 0 (Salimans et al., 2016)."""
    scores = []
    for start in range(0, len(probabilities), split):
        chunk = probabilities[start:start + split]
        divergence = 0
        for c in range(chunk.shape[1]):
            q = sum(p[c] for p in chunk) / len(chunk)
            divergence += sum(p[c] * math.log(p[c] / q) for p in chunk if p[c] > 0) / len(chunk)
        scores.append(math.exp(divergence))
    return sum(scores) / len(scores)


# --- precision and recall -----------------------------------------------------------------------


def squared_distance(x, y):
    """|x - y|^2 = sum_a (x_a - y_a)^2"""
    return sum((a - b) ** 2 for a, b in zip(x, y))


def half_squared_distance(x, y):
    """|x|^2 - 2 x y + |y|^2 where every result is rounded to float16 on its own, negatives set to
    0: what TensorFlow computes for ADM's evaluator.  Sums are accumulated in float32."""
    half, single = np.float16, np.float32
    x, y = half(x), half(y)
    xx = half(sum(single(half(a * a)) for a in x))
    yy = half(sum(single(half(b * b)) for b in y))
    xy = half(sum(single(a) * single(b) for a, b in zip(x, y)))
    return max(half(half(xx - half(2 * xy)) + yy), half(0))


def radius(points, i, k, distance):
    """Distance of point i to its k-th nearest neighbour: the point itself is number 0."""
    return sorted(distance(points[i], x) for x in points)[k]


def fraction_covered(points, centres, k, distance):
    """The fraction of points x with |x - c_j| <= r_j for some centre c_j."""
    radii = [radius(centres, j, k, distance) for j in range(len(centres))]
    covered = 0
    for x in points:
        covered += any(distance(x, c) <= r for c, r in zip(centres, radii))
    return covered / len(points)


def precision_recall(real, fake, k=3, distance=squared_distance):
    """Precision: samples in the support of the data.  Recall: data in the support of the samples.
    A support is the union of the balls around its points (Kynkaanniemi et al., 2019)."""
    return (fraction_covered(fake, real, k, distance), fraction_covered(real, fake, k, distance))


# --- images -------------------------------------------------------------------------------------


def resize_tf1(image, size):
    """out[i, j] is the image at (i H / size, j W / size), linear between its four neighbours.

    No half pixel is added, nothing is averaged, past the last row and column they repeat.
    TensorFlow computes positions in float32.
    """
    H, W, _ = image.shape
    out = np.zeros((size, size, image.shape[2]))
    for i in range(size):
        for j in range(size):
            y, x = (float(np.float32(k) * np.float32(n / size)) for k, n in ((i, H), (j, W)))
            top, left = int(y), int(x)
            bottom, right = min(top + 1, H - 1), min(left + 1, W - 1)
            above = image[top, left] + (image[top, right] - image[top, left]) * (x - left)
            below = image[bottom, left] + (image[bottom, right] - image[bottom, left]) * (x - left)
            out[i, j] = above + (below - above) * (y - top)
    return out


def halved(image):
    """Each pixel is the mean of a square of two by two."""
    return sum(image[i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4


def cubic(x, a=-0.5):
    """Keys' cubic (1981): through 1 at 0, through 0 at the other integers, 0 beyond 2"""
    x = abs(x)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0


def resample_rows(image, size):
    """out[i] is the mean of the rows around (i + 1/2) H / size - 1/2, weighted by the cubic, which
    is stretched where the image shrinks, so that every row has its part."""
    scale = len(image) / size
    rows = []
    for i in range(size):
        weights = [cubic((j + 0.5 - (i + 0.5) * scale) / max(scale, 1)) for j in range(len(image))]
        rows.append(sum(w * row for w, row in zip(weights, image)) / sum(weights))
    return np.array(rows)


def center_crop(image, size):
    """ADM's preparation of an image: both sides are halved while the shorter is at least twice too
    long; then the shorter becomes `size`, by a cubic, and the middle is cut out."""
    while min(image.shape[:2]) >= 2 * size:
        image = halved(image)
    H, W = (round(side * (size / min(image.shape[:2]))) for side in image.shape[:2])
    image = resample_rows(image, H)
    image = resample_rows(image.transpose(1, 0, 2), W).transpose(1, 0, 2)
    top, left = (H - size) // 2, (W - size) // 2
    return image[top:top + size, left:left + size]
