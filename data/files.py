"""What the data sets share in reading files."""


def first_line(error: Exception) -> str:
    """The first line of the error's message, or its type if it has none."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
