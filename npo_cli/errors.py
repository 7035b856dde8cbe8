"""The one error a user is meant to read."""


class NpoError(Exception):
    """A user's mistake or the world's: what is wrong, and the command or edit that mends it."""

    exit_code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class RunFailed(NpoError):
    """Nothing was wrong with what was asked, but it could not be finished (a full disk, a dead engine)."""

    exit_code = 1


class StoppedEarly(NpoError):
    """A signal ended the run after a whole step; it can be resumed."""

    exit_code = 130
