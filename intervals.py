"""Intervals of numbers, written as in "[0, 1)"."""

import math


def outside(number: float, interval: str) -> str | None:
    """What is wrong with a number that is not in an interval such as "[0, 1)"; None if it is."""
    low, high = bounds(interval)
    above = number >= low if interval[0] == "[" else number > low
    below = number <= high if interval[-1] == "]" else number < high
    if above and below:
        return None
    if not math.isfinite(number):
        return f"must be a finite number, not {number}"
    if interval == "[0, inf)":
        return f"must not be negative, but is {number}"
    if high == math.inf:
        return f"must be {'at least' if interval[0] == '[' else 'above'} {low:g}, not {number}"
    if interval[0] + interval[-1] == "()":
        return f"must be between {low:g} and {high:g}, not {number}"
    return f"must be in {interval}, not {number}"


def in_words(interval: str) -> str:
    """An interval as the help of an option tells it; "" for all finite numbers."""
    low, high = bounds(interval)
    if low == -math.inf:
        return ""
    if high == math.inf:
        return f"{'at least' if interval[0] == '[' else 'above'} {low:g}"
    return f"in {interval}"


def bounds(interval: str) -> tuple[float, float]:
    low, high = interval[1:-1].split(",")
    return float(low), float(high)
