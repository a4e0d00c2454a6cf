"""Chapter 1: cutting an image into patches and putting it back."""

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
    rows, columns, P, data
):
    """Forbids column-major order, which a bijection alone would not notice."""
    x = torch.randn(2, 3, rows * P, columns * P)
    n = data.draw(st.integers(0, rows * columns - 1))
    i, j = n // columns * P, n % columns * P
    assert torch.equal(patchify(x, P)[:, n], x[:, :, i : i + P, j : j + P])


def test_an_image_that_does_not_divide_is_refused_with_the_sizes_that_would():
    with pytest.raises(
        ValueError, match="image width=250 is not a multiple of patch_size=16; .* 240, 256"
    ):
        patchify(torch.zeros(1, 3, 32, 250), 16)
