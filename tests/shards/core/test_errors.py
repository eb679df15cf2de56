"""Messages: one line that any terminal takes."""

from __future__ import annotations

import pytest

from shards.core.errors import ConfigError
from shards.core.files import printable

pytestmark = pytest.mark.fast


def test_a_message_is_printable_and_short() -> None:
    told = ConfigError("a.yaml", "x\x1b[31m", "y" * 10**6, "one\u2028line", "Do\nit").line()
    assert told.isprintable() and len(told) < 1200
    assert told.startswith(r"a.yaml: x\x1b[31m: got yyy") and told.endswith("..., expected one line. Do it")


def test_half_of_a_pair_is_printable() -> None:
    """JSON and UTF-16 hold some: such a name stopped the message about it."""
    assert printable("\ud800") == r"\xed\xa0\x80" and printable("a\udcff") == r"a\xff"
