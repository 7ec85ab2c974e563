"""Arguments: old names for one more version, and the error for a wrong type or a wrong value."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

__all__ = ["check", "is_number", "is_whole", "renamed"]


def is_whole(value: Any) -> bool:
    """Tell whether a value is a whole number, NumPy's included; True and False are none.

    >>> import numpy
    >>> is_whole(numpy.int64(3)), is_whole(True), is_whole(3.0)
    (True, False, False)
    """
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Tell whether a value is a real number, NumPy's included; True and False are none.

    >>> import numpy
    >>> is_number(numpy.float32(0.5)), is_number("0.5")
    (True, False)
    """
    return isinstance(value, Real) and not isinstance(value, bool)


def check(wanted: str, value: Any, right_type: bool, allowed: Callable[[Any], bool] | None = None) -> None:
    """Raise an error that says what is wanted and what was received.

    Args:
        wanted: name of the argument and what it may be.
        value: what was received.
        right_type: whether its type is a right one.
        allowed: tells of a value of the right type whether it may be; None if all may.

    Raises:
        TypeError: the type is wrong.
        ValueError: the value is not allowed.

    >>> check("rank must be 1 or more", 0, is_whole(0), lambda rank: rank >= 1)
    Traceback (most recent call last):
    ValueError: rank must be 1 or more; got 0
    """
    if not right_type or (allowed is not None and not allowed(value)):
        raise (ValueError if right_type else TypeError)(f"{wanted}; got {value!r}")


def renamed(**new_names: str) -> Callable[[Callable], Callable]:
    """Let a function take arguments by their old names as well, with a DeprecationWarning.

    Args:
        **new_names: old name=new name.

    >>> @renamed(residual="keep_share")
    ... def project(keep_share=0.0):
    ...     return keep_share
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     project(residual=0.3), str(caught[0].message)
    (0.3, 'project(): residual is called keep_share now; the old name goes with version 0.3')
    """

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args, **kwargs):
            for old in new_names.keys() & kwargs.keys():
                new, name = new_names[old], function.__qualname__.removesuffix(".__init__")
                if new in kwargs:
                    raise TypeError(f"{name}() got {new} and its old name, {old}; give {new} alone")
                text = f"{name}(): {old} is called {new} now; the old name goes with version 0.3"
                warnings.warn(text, DeprecationWarning, stacklevel=2)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate
