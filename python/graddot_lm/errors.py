class GraddotError(Exception):
    """A mistake in the input or the environment; the message says what was wrong and what to do."""


def printable(text: str) -> str:
    """`text` with what would move the cursor or colour the screen escaped; lines stay lines."""
    shown = (char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)
    return "".join(shown)
