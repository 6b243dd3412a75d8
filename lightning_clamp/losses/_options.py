"""The sentences that refuse an option."""


def check_at_least(name: str, value: float, least: float) -> None:
    """Refuse an option below ``least`` or nan."""
    if not value >= least:
        raise ValueError(f"`{name}` must be at least {least}, got {value}.")


def check_between(name: str, value: float, low: float, high: float) -> None:
    """Refuse an option outside ``[low, high]``."""
    if not low <= value <= high:
        raise ValueError(f"`{name}` must lie in [{low}, {high}], got {value}.")


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Refuse an option that is none of ``choices``."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {choices}, got {value!r}.")
