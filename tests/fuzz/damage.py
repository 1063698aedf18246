"""Ways to damage the bytes of a file, and values that nobody should have to expect."""

from __future__ import annotations

from random import Random

__all__ = ["NUMBERS", "STRINGS", "VALUES", "damaged"]

NUMBERS = [
    *(0, -1, 1, 2, 3, 7, 32, 33, 255, 256, -(2**31), 2**31 - 1, 2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**64, 10**30),
    *(0.0, -0.0, 0.5, 1.0, 1.5, -1.5, 1e-300, 5e-324, 1e300, -1e300, 1e9, float("inf"), float("-inf"), float("nan")),
]
STRINGS = [
    *("", " ", "null", "None", "true", "nan", "-", "--", "=", "a=b", "[", "[]", "{}", "{a: 1}", "[1, 2, 3]", "!!int x"),
    *(
        "&a [*a]",
        "!!python/object/apply:os.getcwd []",
        "\0",
        "a\0b",
        "\n",
        "é" * 20,
        "\ud800",
        "x" * 5000,
        "%s%n",
        "1_0",
    ),
    *("0x10", "1e400", "-1e400", "9" * 5000, "💧", "../..", ".", "..", "/", "no/such", "*", "~", "$HOME", "2020-13-45"),
]
VALUES = [None, True, False, *NUMBERS, *STRINGS, b"", b"\xff\xfe", [], {}, [None], {"a": {}}, [[1]], (1, 2), [0.5] * 40]


def damaged(random: Random, content: bytes) -> bytes:
    """Return the bytes of a file with a few of them changed, lost, doubled or zeroed."""
    data = bytearray(content)
    # Half of all damage is near the ends, where formats keep what the rest means.
    near = random.choice((0, len(data) - 1500, None, None))
    place = random.randrange(len(data)) if near is None else min(max(0, near + random.randrange(1500)), len(data) - 1)
    kind = random.randrange(8)
    length = min(random.choice((1, 2, 4, 8, 64, 4096)), len(data) - place)
    if kind <= 2:
        data[place] ^= 1 << random.randrange(8)
    elif kind == 3:
        data[place] = random.choice((0, 0xFF, random.randrange(256)))
    elif kind == 4:
        data[place : place + length] = bytes(length)
    elif kind == 5:
        data[place : place + length] = random.randbytes(length)
    elif kind == 6:
        del data[place:]
    else:
        data[place:place] = data[place : place + length]
    return bytes(data)
