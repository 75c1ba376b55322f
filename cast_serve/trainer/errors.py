"""The one error of this package that is meant for users, said in one line."""


class RunError(ValueError):
    """A run that cannot start or go on; `str` is one line: what is wrong, and what to do."""

    def __str__(self) -> str:
        # Messages quote files and other libraries' errors: a line break in one must not break ours.
        return " ".join(super().__str__().split())
