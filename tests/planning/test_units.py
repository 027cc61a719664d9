"""Sizes are read exactly, and never by guessing what a bare number means."""

import pytest

from lightning_memopt.planning.units import parse_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("24GiB", 24 * 2**30),
        ("24GB", 24 * 10**9),
        ("1.5 gib", 3 * 2**29),
        ("0.1GB", 10**8),
        ("512 MiB", 2**29),
        ("7KB", 7000),
        ("2tib", 2**41),
        ("100B", 100),
        (12345, 12345),
    ],
)
def test_a_size_with_a_unit_is_exact(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["24", "24G", "24g", "24.0"])
def test_a_size_that_can_be_read_in_two_ways_is_refused_with_both(text):
    with pytest.raises(ValueError, match="two ways") as refused:
        parse_bytes(text)
    assert "GiB' (25,769,803,776 bytes)" in str(refused.value)
    assert "GB' (24,000,000,000 bytes)" in str(refused.value)


@pytest.mark.parametrize("text", ["", "GiB", "-3GiB", "24 GiB of it", "1e9B", "24Gb/s", "24PiB", "nan", True])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match=r"size|unit"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["0GiB", "0.5B", 0, -1])
def test_less_than_a_byte_is_refused(text):
    with pytest.raises(ValueError, match="less than one byte"):
        parse_bytes(text)
