"""Checks of a configuration's fields, for the __post_init__ of its dataclass: a config.json may come from anywhere.

A field that does not pass raises InputError: one line with its name, its value and what is accepted.
"""
import math

from common.cli import InputError


def refuse(config, name, accepted):
    text = repr(getattr(config, name))
    if len(text) > 80:
        text = text[:80] + "..."
    raise InputError(f"{name} is {text}; accepted: {accepted}")


def whole(config, low, high, *names):
    """Each field is an int from low to high; a bool, to Python also an int, is refused."""
    for name in names:
        value = getattr(config, name)
        if type(value) is not int or not low <= value <= high:
            refuse(config, name, f"a whole number from {low:,} to {high:,}")


def wholes(config, low, high, fewest, most, *names):
    """Each field is a list or tuple of ints from low to high, `fewest` to `most` of them; it becomes a tuple."""
    for name in names:
        values = getattr(config, name)
        if not (isinstance(values, (list, tuple)) and fewest <= len(values) <= most
                and all(type(value) is int and low <= value <= high for value in values)):
            count = fewest if fewest == most else f"{fewest} to {most}"
            refuse(config, name, f"a list of {count} whole numbers from {low:,} to {high:,}")
        setattr(config, name, tuple(values))


def number(config, low, high, *names):
    """Each field is a finite number from low to high."""
    for name in names:
        value = getattr(config, name)
        if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high:
            refuse(config, name, f"a number from {low:g} to {high:g}")


def one_of(config, choices, *names):
    """Each field is one of the choices."""
    for name in names:
        if getattr(config, name) not in choices:
            refuse(config, name, " or ".join(map(repr, choices)))


def kind(config, wanted, *names):
    """Each field is of the type `wanted`: dict, list or str."""
    for name in names:
        if not isinstance(getattr(config, name), wanted):
            refuse(config, name, f"a value of type {wanted.__name__}")


def names(config, *fields):
    """Each field is a list or tuple of different names, none of them empty; it becomes a tuple."""
    for name in fields:
        values = getattr(config, name)
        if not (isinstance(values, (list, tuple)) and 0 < len(values) <= 10_000
                and all(isinstance(value, str) and value.strip() for value in values)
                and len(set(values)) == len(values)):
            refuse(config, name, "a list of different names")
        setattr(config, name, tuple(values))
