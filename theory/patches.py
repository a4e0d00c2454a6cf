"""
Makes theory/patches.npz: what section 7 needs of images that are not Gaussian.

    python -m theory.patches PHOTOS.zip          # 4 minutes on one CPU thread, 1 GB of memory

"photos_256_P" are the eigenvalues of the covariance of the P x P patches of the photos in the zip,
each scaled down to a shorter side of 256 pixels and cropped to its middle; smaller photos are left
out.  "photos_native_P" are the same in the size in which they are stored.  "shapes_P" (2, times,
3 P^2) are eigenvalues of the covariance of the best linear guess of v in a patch of the drawn
shapes, given all of x_t: their means over the patches, and those of the mean covariance.
"""

import argparse
import io
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from theory.model import variance_of_v, token_cost
from theory.tokens import SHAPES_TIMES


def cut(image, side):
    """(H, W, 3) -> (n, 3 side^2), row by row; borders that fill no patch are dropped"""
    rows, columns = image.shape[0] // side, image.shape[1] // side
    grid = image[:rows * side, :columns * side].reshape(rows, side, columns, side, 3)
    return grid.swapaxes(1, 2).reshape(-1, 3 * side**2)


def moments(batches):
    """Sum of (1, x) (1, x)^T over all rows x of levels 0 to 255, which become -1 to 1"""
    total = 0.0
    for rows in batches:
        x = np.pad(rows / 127.5 - 1, ((0, 0), (1, 0)), constant_values=1)
        total += x.T @ x
    return total


def spectrum(total):
    """(eigenvalues, eigenvectors) of the covariance, from these sums"""
    mean = total[0, 1:] / total[0, 0]
    lam, U = np.linalg.eigh(total[1:, 1:] / total[0, 0] - np.outer(mean, mean))
    return np.maximum(lam, 0), U                             # rounding may give -1e-15


def photos(path, native):
    """Pixels of each photo, (H, W, 3): as stored, or 256 x 256; none is enlarged."""
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            if name.lower().endswith((".jpeg", ".jpg")):
                photo = Image.open(io.BytesIO(archive.read(name))).convert("RGB")
                if native or min(photo.size) >= 256:
                    yield np.asarray(photo if native else ImageOps.fit(photo, (256, 256)))


def of_photos(path, kind, side):
    """(3 side^2,): the eigenvalues.  Prints how far apart the bounds from two halves of the photos
    are."""
    halves = [0.0, 0.0]
    for i, photo in enumerate(photos(path, kind == "native")):
        halves[i % 2] += moments([cut(photo, side)])
    if np.ndim(halves[1]) == 0:
        raise SystemExit(f"{path} holds fewer than two JPEGs that can be used; give another zip")
    bounds = [[token_cost(variance_of_v(lam, t), k) for t in SHAPES_TIMES for k in (384, 768, 1152)]
              for lam, _ in map(spectrum, halves)]
    apart = np.abs(np.subtract(*bounds)).max()
    print(f"photos, {kind}, {side} x {side}: {sum(halves)[0, 0]:.0f} patches; bounds from two "
          f"halves are up to {apart:.4f} apart")
    return spectrum(sum(halves))[0]


def of_shapes(number=50_000, size=32, sides=(4, 8)):
    """{name: (2, times, 3 side^2)}"""
    from train import Shapes                 # only here: the rest of this folder stands alone
    images, found = Shapes(size), {}
    lam, U = spectrum(moments(np.stack([images[i][0].ravel() for i in range(start, start + 1000)])
                              for start in range(0, number, 1000)))
    for side in sides:
        patches = cut(np.arange(len(lam)).reshape(size, size, 3), side)
        guesses = [[U[pixels] * variance_of_v(lam, t) @ U[pixels].T for pixels in patches]
                   for t in SHAPES_TIMES]
        found[f"shapes_{side}"] = np.array([np.linalg.eigvalsh(guesses).mean(axis=1),
                                            np.linalg.eigvalsh(np.mean(guesses, axis=1))])
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Makes theory/patches.npz.")
    parser.add_argument("photos", help="zip of JPEGs, in any folders")
    path = parser.parse_args().photos
    result = of_shapes() | {f"photos_{kind}_{side}": of_photos(path, kind, side)
                            for kind in ("256", "native") for side in (16, 32)}
    np.savez(Path(__file__).with_name("patches.npz"),
             **{name: values.astype(np.float32) for name, values in result.items()})
