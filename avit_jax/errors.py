"""The one exception that means: the user can mend this."""


class UserError(Exception):
    """A mistake outside the program; its message is one sentence that says what to do, and is all that is shown."""
