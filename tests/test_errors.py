"""Tests of error messages."""

import pickle

import pytest

from metaformer.errors import UserError, printable


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\nb\tc", "a\\nb\\tc"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("bad \udcff byte", "bad \\udcff byte"),
        ("café 'x y' 画", "café 'x y' 画"),
    ],
)
def test_messages_are_one_printable_line(text: str, line: str) -> None:
    """Unprintable characters are escaped once, even if the error is pickled to another process."""
    assert printable(text) == line
    error = pickle.loads(pickle.dumps(UserError(text)))
    assert str(error) == line
