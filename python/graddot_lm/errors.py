class GraddotError(Exception):
    """A mistake in the input or the environment; the message says what was wrong and what to do."""
