"""Chapter 1.  The law of patches: an image is cut into squares in row-major order, and the squares
give the image back, for every rectangle of whole squares."""

import literal
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dip import patchify, unpatchify

sizes = st.integers(1, 5)


@settings(max_examples=30)
@given(channels=sizes, rows=sizes, columns=sizes, P=sizes)
def test_patches_are_squares_in_row_major_order_and_give_the_image_back(
        channels, rows, columns, P):
    """Catches column-major order, (C, P, P) read as (P, P, C), and H and W exchanged."""
    x = torch.randn(2, channels, rows * P, columns * P)
    patches = patchify(x, P)
    expected = [[literal.patch(image, P, n) for n in range(rows * columns)] for image in x]
    assert torch.equal(patches, torch.tensor(np.array(expected)).float())
    assert torch.equal(unpatchify(patches, x.shape[-2:]), x)


@pytest.mark.parametrize("size, line", [
    ((32, 250), "image width=250 is not a multiple of patch_size=16; nearest that fit: 240, 256"),
    ((8, 32), "image height=8 is not a multiple of patch_size=16; nearest that fit: 16"),
])
def test_an_image_that_does_not_divide_is_refused_with_the_nearest_sizes_that_do(size, line):
    """Catches pixels dropped at the border, and advice that does not fit either."""
    with pytest.raises(ValueError) as refused:
        patchify(torch.zeros(1, 3, *size), 16)
    assert str(refused.value) == line
