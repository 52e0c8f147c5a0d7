"""Covariances of pixels: sums over windows that slide over both images, and entries at equal pixels.

The dimensions of the pixels come before those of the pairs, ``[*pixels, ...]`` or ``[*pixels, *pixels', ...]``: a
shifted image is then a run of whole blocks of pairs, and everything that is constant over pixels broadcasts.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bayesdl.errors import ModelError


def equal_pixels(q: Tensor, spatial: int) -> Tensor:
    """From ``[*pixels, *pixels', ...]`` the entries at equal pixels, ``[*pixels, ...]``."""
    pixels, pairs = q.shape[:spatial], q.shape[2 * spatial :]
    count = pixels.numel()
    return q.reshape(count, count, *pairs).diagonal(dim1=0, dim2=1).movedim(-1, 0).reshape(*pixels, *pairs)


def window_sums(
    q: Tensor,
    axes: Sequence[tuple[int, ...]],
    window: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
) -> Tensor:
    """The sum over a window, zeros around the image counted; the k-th offset moves along all of ``axes[k]`` at once.

    Raises:
        ModelError: the window is larger than the padded image.
    """
    for shape in zip(axes, window, stride, padding, dilation, strict=True):
        q = _slide(q, *shape)
    return q


def _slide(
    q: Tensor, axes: tuple[int, ...], window: int, stride: int, padding: tuple[int, int], dilation: int
) -> Tensor:
    before, after = padding
    length = q.shape[axes[0]]
    count = (length + before + after - dilation * (window - 1) - 1) // stride + 1
    if count < 1:
        raise ModelError(f"A window of {window} pixels is larger than an image of {length} pixels.")

    def over(part: slice) -> tuple[slice, ...]:
        return tuple(part if axis in axes else slice(None) for axis in range(max(axes) + 1))

    terms = []
    for offset in range(window):
        # Places k with 0 <= k stride + shift < length; the others see the zeros around the image.
        shift = offset * dilation - before
        start, stop = max(0, -(shift // stride)), min(count, (length - 1 - shift) // stride + 1)
        if stop > start:
            first = start * stride + shift
            seen = slice(first, first + (stop - start - 1) * stride + 1, stride)
            terms.append((stop - start, over(slice(start, stop)), over(seen)))
    terms.sort(key=lambda term: -term[0])
    if terms and terms[0][0] == count:  # an offset that sees the image everywhere is the sum to begin with
        total = q[terms.pop(0)[2]].clone()
    else:
        shape = list(q.shape)
        for axis in axes:
            shape[axis] = count
        total = q.new_zeros(shape)
    for _, places, seen_there in terms:
        total[places] += q[seen_there]
    return total
