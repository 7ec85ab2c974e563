"""What the parameterized notebooks need: parameters that are checked before anything runs."""

from __future__ import annotations

import ast
import dataclasses
import difflib
from collections.abc import Mapping

from lrpet.config import RunConfig

__all__ = ["check_parameters", "config_from_parameters"]
FIELDS = tuple(field.name for field in dataclasses.fields(RunConfig))


def check_parameters(namespace: Mapping, allowed: tuple[str, ...]) -> None:
    """Refuse a parameter that the notebook does not know; papermill only warns and runs the default.

    Args:
        namespace: ``globals()`` of the notebook, whose ``In`` holds the source of every cell run so far.
        allowed: the names of all parameters.

    Raises:
        ValueError: a cell of nothing but literals, such as papermill injects, sets an unknown name.

    >>> check_parameters({"In": ["# Parameters\\nprune_ration = 0.7"]}, ("prune_ratio",))
    Traceback (most recent call last):
    ...
    ValueError: 'prune_ration' is not a parameter of this notebook; did you mean 'prune_ratio'?
    """
    for source in namespace.get("In", ()):
        injected = source.lstrip().startswith("# Parameters")
        try:
            names = [_assigned(statement) for statement in ast.parse(source).body]
        except SyntaxError:  # a cell with shell or magic commands is no parameter cell
            continue
        if None in names or not (injected or set(names) & set(allowed)):
            continue
        for name in names:
            if name not in allowed:
                close = difflib.get_close_matches(name, allowed, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(allowed)}"
                raise ValueError(f"{name!r} is not a parameter of this notebook; {hint}")


def config_from_parameters(namespace: Mapping, also: tuple[str, ...] = ("data", "device")) -> RunConfig:
    """Build the configuration of a run from the parameters of a notebook.

    Args:
        namespace: ``globals()`` of the notebook.
        also: parameters that are no fields of RunConfig.

    Returns:
        The validated configuration; fields that the notebook does not set keep their defaults.

    Raises:
        ValueError: an unknown name, or a value that RunConfig refuses.

    >>> config_from_parameters({"seed": 3, "device": "cpu"}).seed
    3
    """
    check_parameters(namespace, (*FIELDS, *also))
    return RunConfig(**{name: namespace[name] for name in FIELDS if name in namespace})


def _assigned(statement: ast.stmt) -> str | None:
    """Return the name that a statement sets to a literal, or None for any other statement."""
    if isinstance(statement, ast.AnnAssign):
        target = statement.target
    elif isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target = statement.targets[0]
    else:
        return None
    try:
        ast.literal_eval(statement.value)
    except (ValueError, TypeError):
        return None
    return target.id if isinstance(target, ast.Name) else None
