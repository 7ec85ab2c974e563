"""What the parameterized notebooks need: parameters that are checked before anything runs."""

from __future__ import annotations

import ast
import dataclasses
import difflib
from collections.abc import Mapping

from lrpet.config import RunConfig, check_field, check_type

__all__ = ["RefusedParameter", "check_parameters", "config_from_parameters"]
FIELDS = {field.name: field for field in dataclasses.fields(RunConfig)}


class RefusedParameter(ValueError):
    """A parameter that a notebook cannot use; a notebook shows its one line, not where it was found out.

    >>> RefusedParameter("seed must be int; got 'a'")._render_traceback_()
    ["refused: seed must be int; got 'a'"]
    """

    def _render_traceback_(self) -> list[str]:
        return [f"refused: {self}"]  # what IPython asks for before it writes a traceback


def check_parameters(namespace: Mapping, allowed: tuple[str, ...]) -> None:
    """Refuse a parameter that the notebook does not know, or whose value it cannot use.

    papermill only warns of an unknown name, and runs the default; a value it hands on whatever it is.

    Args:
        namespace: ``globals()`` of the notebook, whose ``In`` holds the source of every cell run so far.
        allowed: the names of all parameters.

    Raises:
        RefusedParameter: a cell of nothing but literals, such as papermill injects, sets an unknown name; or
            a value has not the type that the notebook declares, or is none that RunConfig's field may have.

    >>> check_parameters({"In": ["# Parameters\\nprune_ration = 0.7"]}, ("seed",))
    Traceback (most recent call last):
    ...
    lrpet.parameters.RefusedParameter: 'prune_ration' is not a parameter of this notebook; it has seed
    """
    for source in namespace.get("In", ()):
        injected = source.lstrip().startswith("# Parameters")
        try:
            statements = ast.parse(source).body
        except SyntaxError:  # a cell with shell or magic commands is no parameter cell
            continue
        names = [_assigned(statement) for statement in statements]
        if None in names or not (injected or set(names) & set(allowed)):
            continue
        for name, statement in zip(names, statements, strict=True):
            if name not in allowed:
                close = difflib.get_close_matches(name, allowed, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(allowed)}"
                raise RefusedParameter(f"{name!r} is not a parameter of this notebook; {hint}")
            if isinstance(statement, ast.AnnAssign):
                _check_value(name, namespace.get(name), ast.unparse(statement.annotation))


def _check_value(name: str, value, annotation: str) -> None:
    """Refuse a value that is not of the annotated type; None is for whoever uses it to judge."""
    if annotation == "list" and not isinstance(value, (list, tuple, Mapping, type(None))):
        items = str(value).strip("[]()")
        raise RefusedParameter(
            f"{name} must be a list; got {value!r}; papermill takes a list as -y '{name}: [{items}]'"
        )
    try:
        if annotation != "list":
            check_type(name, value, f"{annotation} | None")
        if name in FIELDS and value is not None and not isinstance(value, (list, tuple, Mapping)):
            check_field(FIELDS[name], value)
    except ValueError as error:
        raise RefusedParameter(error) from None


def config_from_parameters(namespace: Mapping, also: tuple[str, ...] = ("data", "device")) -> RunConfig:
    """Build the configuration of a run from the parameters of a notebook.

    Args:
        namespace: ``globals()`` of the notebook.
        also: parameters that are no fields of RunConfig.

    Returns:
        The validated configuration; fields that the notebook does not set keep their defaults.

    Raises:
        RefusedParameter: an unknown name, or a value that RunConfig refuses.

    >>> config_from_parameters({"seed": 3, "device": "cpu"}).seed
    3
    """
    check_parameters(namespace, (*FIELDS, *also))
    try:
        return RunConfig(**{name: namespace[name] for name in FIELDS if name in namespace})
    except ValueError as error:
        raise RefusedParameter(error) from None


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
