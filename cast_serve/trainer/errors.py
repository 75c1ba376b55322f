"""The one error of this package that is meant for users, said in one line."""


class RunError(ValueError):
    """A run that cannot start or go on; `str` is one line: what is wrong, and what to do."""

    def __str__(self) -> str:
        # Messages quote files and other libraries' errors: a line break in one must not break ours.
        return " ".join(super().__str__().split())


def first_line(error: BaseException) -> str:
    """What another library's error says before its advice; its name where it says nothing."""
    first, _, rest = str(error).strip().partition("\n")
    # "Validation error for field 'hidden_size':" is not yet the reason.
    if first.rstrip().endswith(":"):
        first += " " + rest.strip().partition("\n")[0]
    return first.strip() or type(error).__name__
