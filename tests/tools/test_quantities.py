"""Numbers as the tables and pages show them: what is rounded up to the next unit is written in it."""

import pytest

from nacre.tools.quantities import duration, mebibytes, quantity


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (9_999, "10.0 k"),
        (99_960, "100 k"),
        (999_499, "999 k"),
        (999_600, "1.00 M"),
        (18_000_000, "18.0 M"),
        (-1_500, "-1.50 k"),
        (2 * 10**18, "2000 P"),
    ],
)
def test_counts_have_three_digits_and_no_exponent(number, text):
    assert quantity(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 us"),
        (999.6e-6, "1 ms"),
        (0.4567, "457 ms"),
        (0.99996, "1 s"),
        (99.96, "100 s"),
        (1234.4, "1234 s"),
    ],
)
def test_times_have_three_digits_and_no_exponent(seconds, text):
    assert duration(seconds) == text


def test_sizes_have_one_unit():
    assert [mebibytes(value) for value in (None, 2**19, 2**20 * 250)] == ["", "0.5 MiB", "250 MiB"]
