"""What is raised when the user's input is at fault."""

LONGEST = 2000
"""Letters of a message; a caption in it may have a hundred thousand."""

SPACES = "\n\t\u00a0\u202f\u3000\u200c\u200d"
"""What is not printable for Python and harmless: spaces in names of files, and joiners in many scripts."""


class InputError(ValueError):
    """Something the user wrote, named or put in a folder cannot be used.

    The message is one line that says what is wrong, where (file, row or key of the config), and what to do. The command
    line prints that line alone; everywhere else it is an ordinary ValueError.
    """

    def __str__(self) -> str:
        """Returns the message as a terminal can be given it: names and captions in it may be a stranger's."""
        text = super().__str__()
        text = text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
        return "".join(letter if letter.isprintable() or letter in SPACES else ascii(letter)[1:-1] for letter in text)
