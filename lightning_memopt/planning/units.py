"""Read sizes as people write them, without guessing which unit they mean."""

import re
from fractions import Fraction

_UNITS = {"B": 1} | {
    f"{prefix}{suffix}": base**power
    for suffix, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate("KMGT", start=1)
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(size: str | int) -> int:
    """Bytes of a size with its unit: ``parse_bytes("24GiB") == 24 * 2**30``, ``parse_bytes("24GB") == 24 * 10**9``.

    Args:
        size: A number with B, or K, M, G, T and B (powers of 1000) or iB (powers of 1024); upper and lower case are
            the same. A whole number is bytes already.

    Raises:
        ValueError: No unit or half of one ("24", "24G"), which can be read in two ways; something else; or nothing.
    """
    is_bytes = isinstance(size, int) and not isinstance(size, bool)
    count = Fraction(size) if is_bytes else _count(str(size))
    if count < 1:
        raise ValueError(f"{size!r} is no size of a memory: it is less than one byte; give more")
    return int(count)


def _count(text: str) -> Fraction:
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no size; give a number and its unit, such as '24GiB' or '24GB'")
    number, unit = match.groups()
    factors = {name.lower(): factor for name, factor in _UNITS.items()}
    factor = factors.get(unit.lower())
    if factor is not None:
        return Fraction(number) * factor
    letter = unit.upper() or "G"
    if len(letter) == 1 and letter in "KMGT":
        both = " or ".join(
            f"'{number}{letter}{end}' ({int(Fraction(number) * _UNITS[letter + end]):,} bytes)" for end in ("iB", "B")
        )
        raise ValueError(f"{text!r} can be read in two ways; say which: {both}")
    raise ValueError(f"{text!r} has the unit {unit!r}, which is none of {', '.join(_UNITS)}")
