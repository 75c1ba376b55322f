"""Values of command lines that several benchmarks take."""


def require_one(flag: str, given: int) -> None:
    """Refuse a count below 1.

    Raises:
        ValueError: names `flag`.
    """
    if given < 1:
        raise ValueError(f"{flag} {given}: needs 1 or more")


def numbers(flag: str, given: str) -> list[int]:
    """Numbers from 1 on, from "1,8".

    Raises:
        ValueError: something else; names `flag`.
    """
    found = given.split(",")
    if not all(number.isdecimal() and int(number) for number in found):
        raise ValueError(f"{flag} {given}: needs numbers from 1 on, such as 1,8")
    return [int(number) for number in found]
