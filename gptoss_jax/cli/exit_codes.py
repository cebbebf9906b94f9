"""What the commands' exit codes mean. Knows nothing else; hosts.EXIT_LOST, 3, is the one more."""

from gptoss_jax.errors import UserError

USER_ERROR = 2
INTERRUPTED = 130
BROKEN_PIPE = 141


def exit_code(error: BaseException) -> int:
    """The code with which a command ends that `error` leaves; 1 is Python's own for what nobody expected."""
    match error:
        case BrokenPipeError():
            return BROKEN_PIPE
        case UserError() | OSError():
            return USER_ERROR
        case KeyboardInterrupt():
            return INTERRUPTED
    return 1
