"""Counts, times and sizes as a reader takes them in: three digits and a unit."""


def quantity(number: float) -> str:
    """A count with three digits and a unit: 1,797,120 as 1.80 M.

    Example:
        >>> quantity(1024), quantity(1_797_120), quantity(31), quantity(999_600)
        ('1.02 k', '1.80 M', '31', '1.00 M')
    """
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        scaled = abs(number) / size
        if round(scaled, 3) >= 1:
            places = 2 if round(scaled, 2) < 10 else 1 if round(scaled, 1) < 100 else 0
            return f"{number / size:.{places}f} {unit}"
    return f"{number:g}"


def duration(seconds: float | None) -> str:
    """Seconds with three digits and a unit, whole ones from 100 on; nothing for None.

    Example:
        >>> duration(0.00123), duration(2.5), duration(7200.0), duration(None)
        ('1.23 ms', '2.5 s', '7200 s', '')
    """
    if seconds is None:
        return ""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if round(seconds / size, 3) >= 1:
            return f"{_three_digits(seconds / size)} {unit}"
    return f"{_three_digits(seconds / 1e-6)} us"


def milliseconds(seconds: float) -> str:
    """A time for a column of times, whose unit is one.

    Example:
        >>> milliseconds(0.0123456), milliseconds(1.5), milliseconds(2.5e-6)
        ('12.3 ms', '1500 ms', '0.0025 ms')
    """
    return f"{_three_digits(seconds * 1e3)} ms"


def mebibytes(bytes: int | None) -> str:
    """A size for a column of sizes, whose unit is one; empty for None.

    Example:
        >>> mebibytes(3 * 2**19), mebibytes(2**30), mebibytes(None)
        ('1.5 MiB', '1024 MiB', '')
    """
    return "" if bytes is None else f"{_three_digits(bytes / 2**20)} MiB"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
