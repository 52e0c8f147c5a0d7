"""A prefix-free code for vectors of few distinct numbers: every bit that a decoder needs is in the message.

The message of D numbers is: how many distinct ones there are (Elias gamma), these as bfloat16 (16 bits each), how often
each occurs (Elias gamma, but for the last), and the sequence by arithmetic coding with these counts, from which every
number that is sent is taken away. Its length is within 2 bits of ``log2 D! / (n_1! ... n_K!)`` for the sequence.

D is known to the decoder, and no message is the beginning of another: the gamma codes end themselves, and the
arithmetic code ends with bits after which anything may follow. So the lengths of all messages satisfy Kraft's
inequality ``sum 2^-bits <= 1``, and ``2^-bits`` is a prior over vectors that was fixed before any data.

Sources: Elias (1975); Witten, Neal and Cleary (1987); Lotfi et al. (2022), section 4, for codes as priors.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bayesdl.errors import CertificateError

_BITS = 60  # of the coder's interval: far more than those of any number of weights
_HALF, _QUARTER, _WHOLE = 1 << (_BITS - 1), 1 << (_BITS - 2), 1 << _BITS
_VALUE_BITS = 16


def encode(values: Tensor) -> bytearray:
    """The message, one bit (0 or 1) a byte.

    Args:
        values: ``[D]``, each a number that bfloat16 holds.

    Raises:
        CertificateError: a value is not one of bfloat16's.

    Cost: about a microsecond a value and distinct number.
    """
    levels, symbols = torch.unique(values.double(), return_inverse=True)
    short = levels.bfloat16()
    if not torch.equal(short.double(), levels):
        raise CertificateError("Only vectors of bfloat16 numbers can be encoded; round them first.")
    counts = torch.bincount(symbols, minlength=len(levels)).tolist()
    message = bytearray(_gamma(len(levels)))
    for number in short.view(torch.int16).tolist():
        message.extend(_fixed(number & 0xFFFF, _VALUE_BITS))
    for count in counts[:-1]:
        message.extend(_gamma(count))
    message.extend(_arithmetic(symbols.tolist(), counts))
    return message


def decode(message: bytes | bytearray, size: int) -> Tensor:
    """The D = ``size`` numbers of a message, in float64, whatever follows it.

    Raises:
        CertificateError: it is no message of so many numbers.
    """
    bits = iter(message)
    try:
        found = _read_gamma(bits)
        numbers = [_read_fixed(bits, _VALUE_BITS) for _ in range(found)]
        counts = [_read_gamma(bits) for _ in range(found - 1)]
    except StopIteration:
        raise CertificateError("The message ends before its code does.") from None
    counts.append(size - sum(counts))
    if counts[-1] < 1:
        raise CertificateError(f"The message is not one of {size} numbers.")
    signed = [number - (1 << _VALUE_BITS) if number >> (_VALUE_BITS - 1) else number for number in numbers]
    levels = torch.tensor(signed, dtype=torch.int16).view(torch.bfloat16).double()
    return levels[torch.tensor(_sequence(bits, counts), dtype=torch.int64)]


def _arithmetic(symbols: list[int], counts: list[int]) -> Iterator[int]:
    """The bits of a sequence: the interval [low, high] shrinks by the share of each symbol among those left."""
    low, high, pending = 0, _WHOLE - 1, 0
    left, total = list(counts), len(symbols)
    for symbol in symbols:
        low, high = _shrunk(low, high, left, symbol, total)
        left[symbol] -= 1
        total -= 1
        while True:
            if high < _HALF or low >= _HALF:
                bit = int(low >= _HALF)
                yield bit
                yield from (1 - bit,) * pending
                pending, cut = 0, bit * _HALF
            elif low >= _QUARTER and high < _HALF + _QUARTER:
                pending, cut = pending + 1, _QUARTER
            else:
                break
            low, high = 2 * (low - cut), 2 * (high - cut) + 1
    # The quarter that lies inside the interval: all that begins with these bits does.
    bit = int(low >= _QUARTER)
    yield bit
    yield from (1 - bit,) * (pending + 1)


def _sequence(bits: Iterator[int], counts: list[int]) -> list[int]:
    """The sequence of a code, read with zeros behind its end."""
    low, high, value = 0, _WHOLE - 1, 0
    for _ in range(_BITS):
        value = 2 * value + next(bits, 0)
    left, total, found = list(counts), sum(counts), []
    while total:
        place, symbol = ((value - low + 1) * total - 1) // (high - low + 1), 0
        while place >= left[symbol]:
            place -= left[symbol]
            symbol += 1
        low, high = _shrunk(low, high, left, symbol, total)
        left[symbol] -= 1
        total -= 1
        found.append(symbol)
        while True:
            if high < _HALF or low >= _HALF:
                cut = _HALF * int(low >= _HALF)
            elif low >= _QUARTER and high < _HALF + _QUARTER:
                cut = _QUARTER
            else:
                break
            low, high, value = 2 * (low - cut), 2 * (high - cut) + 1, 2 * (value - cut) + next(bits, 0)
    return found


def _shrunk(low: int, high: int, left: list[int], symbol: int, total: int) -> tuple[int, int]:
    """The part of the interval that belongs to a symbol."""
    width, before = high - low + 1, sum(left[:symbol])
    return low + width * before // total, low + width * (before + left[symbol]) // total - 1


def _gamma(number: int) -> Iterator[int]:
    """Elias gamma code of a positive whole number: as many zeros as it has further binary digits, then these digits."""
    digits = number.bit_length()
    yield from (0,) * (digits - 1)
    yield from _fixed(number, digits)


def _fixed(number: int, digits: int) -> Iterator[int]:
    return ((number >> place) & 1 for place in range(digits - 1, -1, -1))


def _read_gamma(bits: Iterator[int]) -> int:
    zeros = 0
    while next(bits) == 0:
        zeros += 1
    return (1 << zeros) | _read_fixed(bits, zeros)


def _read_fixed(bits: Iterator[int], digits: int) -> int:
    number = 0
    for _ in range(digits):
        number = 2 * number + next(bits)
    return number
