"""The code for networks: what is decoded is what was encoded, and no bit is left out of the count."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from bayesdl.bounds.coding import decode, encode
from bayesdl.bounds.compressed import quantised
from bayesdl.errors import CertificateError


def normals(seed: int, n: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ideal_bits(values: Tensor) -> float:
    """log2 of the number of sequences with these counts."""
    counts = Counter(values.tolist()).values()
    nats = math.lgamma(len(values) + 1) - sum(math.lgamma(count + 1) for count in counts)
    return nats / math.log(2)


@pytest.mark.parametrize("levels", [1, 2, 3, 8, 33])
@pytest.mark.parametrize("size", [1, 2, 50, 4000])
def test_decoder_returns_the_numbers_whatever_follows_the_message(levels: int, size: int) -> None:
    values = quantised(normals(levels, size) ** 3, levels)
    message = encode(values)
    assert set(message) <= {0, 1}
    assert torch.equal(decode(message, size), values)
    noise = torch.randint(2, (3, 200), generator=torch.Generator().manual_seed(1)).tolist()
    for tail in ([0] * 200, [1] * 200, *noise):
        assert torch.equal(decode(message + bytearray(tail), size), values)


@pytest.mark.parametrize("levels", [2, 5, 17])
def test_length_is_that_of_the_parts_and_of_the_number_of_sequences(levels: int) -> None:
    values = quantised(normals(7, 3000), levels)
    counts = [count for _, count in sorted(Counter(values.tolist()).items())]
    gammas = sum(2 * (number.bit_length() - 1) + 1 for number in (len(counts), *counts[:-1]))
    exact = gammas + 16 * len(counts) + ideal_bits(values)
    assert exact <= len(encode(values)) <= exact + 2.01


def test_lengths_of_all_messages_satisfy_krafts_inequality_and_none_begins_another() -> None:
    messages = set()
    for sequence in itertools.product((-1.0, 0.5, 2.0), repeat=6):
        messages.add(bytes(encode(torch.tensor(sequence))))
    assert len(messages) == 3**6
    assert sum(2.0 ** -len(message) for message in messages) <= 1
    ordered = sorted(messages)
    # In lexical order a message would come right before those that begin with it.
    assert not any(after.startswith(before) for before, after in itertools.pairwise(ordered))
    # As many bits are spent on the levels; of those with these three values the rest alone is a prefix-free code too.
    same = [message for message in messages if message[:3] == b"\x00\x01\x01"]
    assert 0.01 < sum(2.0 ** (3 * 16 - len(message)) for message in same) <= 1


def test_rare_values_cost_what_they_tell() -> None:
    values = torch.zeros(20_000)
    values[torch.randperm(20_000, generator=torch.Generator().manual_seed(0))[:20]] = 1.0
    message = encode(values)
    assert torch.equal(decode(message, 20_000), values.double())
    assert len(message) < 20 * math.log2(20_000 * math.e / 20) + 80


def test_what_is_no_message_is_refused() -> None:
    message = encode(torch.tensor([0.0, 1.0, 1.0]))
    with pytest.raises(CertificateError, match="ends before"):
        decode(message[:20], 3)
    with pytest.raises(CertificateError, match="not one of 1 numbers"):
        decode(message, 1)
    with pytest.raises(CertificateError, match="bfloat16"):
        encode(torch.tensor([0.1], dtype=torch.float64))


def test_quantised_values_are_few_near_and_found_by_clusters() -> None:
    values = torch.cat([centre + 0.01 * normals(k, 300) for k, centre in enumerate((-2.0, 0.0, 4.0))])
    found = quantised(values, 3)
    assert len(found.unique()) == 3
    assert float((found - values).abs().max()) < 0.06
    fine = quantised(normals(0, 2000), 33)
    assert len(fine.unique()) <= 33
    spread = (normals(0, 2000) - fine).square().mean()
    coarse = (normals(0, 2000) - quantised(normals(0, 2000), 5)).square().mean()
    assert spread < coarse / 10
    assert coarse < 0.1  # the best 5 levels of a Gaussian leave 0.0799
    assert torch.equal(quantised(torch.full((4,), 3.0), 5), torch.full((4,), 3.0, dtype=torch.float64))
