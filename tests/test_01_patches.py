"""Chapter 1.  The law of patches: cutting an image into squares and putting them back is a
bijection, in row-major order, for every rectangle of whole squares."""

import literal
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dip import patchify, unpatchify

sizes = st.integers(1, 5)


@given(B=sizes, C=sizes, rows=sizes, columns=sizes, P=sizes)
def test_patches_are_a_bijection_for_every_rectangle(B, C, rows, columns, P):
    """Forbids reading (C, P, P) back as (P, P, C), and mixing up H and W where they differ."""
    x = torch.arange(B * C * rows * P * columns * P).view(B, C, rows * P, columns * P)
    patches = patchify(x, P)
    assert patches.shape == (B, rows * columns, C, P, P)
    assert torch.equal(unpatchify(patches, x.shape[-2:]), x)
    assert torch.equal(patchify(unpatchify(patches, x.shape[-2:]), P), patches)


@given(rows=sizes, columns=sizes, P=sizes, data=st.data())
def test_patch_number_n_is_the_square_at_row_n_div_columns_and_column_n_mod_columns(
        rows, columns, P, data):
    """Forbids column-major order, which a bijection alone would not notice."""
    x = torch.randn(2, 3, rows * P, columns * P)
    n = data.draw(st.integers(0, rows * columns - 1))
    i, j = n // columns * P, n % columns * P
    assert torch.equal(patchify(x, P)[:, n], x[:, :, i : i + P, j : j + P])
    assert torch.equal(patchify(x, P)[1, n], torch.tensor(literal.patch(x[1], P, n)).float())


@given(rows=sizes, columns=sizes, P=sizes)
def test_patches_put_together_pixel_by_pixel_are_the_image(rows, columns, P):
    """Forbids an inverse that is one for its own order of pixels only."""
    patches = torch.randn(2, rows * columns, 3, P, P)
    image = unpatchify(patches, (rows * P, columns * P))
    for b in range(2):
        expected = literal.put_together(patches[b].numpy(), rows * P, columns * P)
        assert torch.equal(image[b], torch.tensor(expected).float())


@pytest.mark.parametrize("size, line", [
    ((32, 250), "image width=250 is not a multiple of patch_size=16; nearest that fit: 240, 256"),
    ((250, 32), "image height=250 is not a multiple of patch_size=16; nearest that fit: 240, 256"),
    ((8, 32), "image height=8 is not a multiple of patch_size=16; nearest that fit: 16"),
    ((32, 0), "image width=0 is not a multiple of patch_size=16; nearest that fit: 16"),
])
def test_an_image_that_does_not_divide_is_refused_with_the_sizes_that_would(size, line):
    """Forbids dropping the pixels at the border, and naming sizes that do not fit either."""
    with pytest.raises(ValueError) as refused:
        patchify(torch.zeros(1, 3, *size), 16)
    assert str(refused.value) == line
