"""The two errors a caller can act on. Knows nothing else; everything may import it."""


class UserError(ValueError):
    """Input that cannot be used: the message names the thing, what was expected, what was found and the way out.

    The command line prints it as one sentence and exits with code 2; any other exception is our own mistake.
    """


class Unsupported(UserError):
    """A kernel or format that the caller named and that cannot be had; the message says why. Nothing falls back."""
