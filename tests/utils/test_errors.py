"""Printed text is safe on a terminal, in any encoding."""

import logging

import pytest

from avit_jax.utils import errors


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "größer, 数, \N{GRINNING FACE}, \N{WOMAN}\N{ZERO WIDTH JOINER}\N{ROCKET}, a\\b",
            None,
        ),  # unchanged
        ("\x1b[31mred", r"\x1b[31mred"),
        ("a\nb\tc\rd\0\x7f", r"a\nb\tc\rd\x00\x7f"),
        ("\x9b31m\x85", r"\x9b31m\x85"),  # escapes of one character
        ("\udcff", r"\udcff"),
        ("\u2028\u2029", r"\u2028\u2029"),
        ("abc\u202egnp.exe", r"abc\u202egnp.exe"),
    ],
)
def test_printable(text: str, expected: str | None) -> None:
    assert errors.printable(text) == (text if expected is None else expected)


def test_an_error_is_one_harmless_line(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_:
        errors.stop("no \x1b[2J\udcff\nfile", status=3)
    assert exit_.value.code == 3
    assert capsys.readouterr().err == "error: no \\x1b[2J\\udcff file\n"


def test_a_log_line_is_harmless_and_keeps_the_traceback_of_an_exception() -> None:
    formatter = errors.Formatter("%(message)s")
    record = logging.LogRecord(
        "a", logging.INFO, "file", 1, "read %s", ("\x1b]0;title\x07\n",), None
    )
    assert formatter.format(record) == r"read \x1b]0;title\x07\n"
    record.exc_text = "Traceback:\n  line"
    assert formatter.format(record).endswith("\nTraceback:\n  line")


def test_a_wrapped_main_ends_with_one_sentence(capsys: pytest.CaptureFixture) -> None:
    def main(argv: list[str]) -> None:
        raise errors.UserError(f"no recipe among {argv}.")

    with pytest.raises(SystemExit) as exit_:
        errors.exit_on_user_error(main)(["a"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "error: no recipe among ['a'].\n"
