"""What is raised when the user's input is at fault."""


class InputError(ValueError):
    """Something the user wrote, named or put in a folder cannot be used.

    The message is one line that says what is wrong, where (file, row or key of the config), and what to do. The command
    line prints that line alone; everywhere else it is an ordinary ValueError.
    """
