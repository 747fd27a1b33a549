"""Numbers that people type."""

import pytest

from cla_jax.typed_numbers import is_digits, number, whole_number

SLIPS = ("\u0665", "1_0", "\uff11", "", "x", "0x1")


def test_plain_numbers_are_read():
    assert (whole_number("-12"), whole_number(" 3")) == (-12, 3)
    assert (number(".5"), number("1e-3"), number("inf")) == (0.5, 1e-3, float("inf"))


@pytest.mark.parametrize("text", SLIPS)
def test_digits_of_other_scripts_and_underscores_are_refused(text):
    assert not is_digits(text)
    for read, what in ((whole_number, "a whole number"), (number, "a number")):
        with pytest.raises(ValueError, match=f"is not {what}"):
            read(text)
