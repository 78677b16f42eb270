"Docstrings that show in a terminal what the comments beside the parameters say."

import inspect
from typing import Any

from fastcore.docments import docments

__all__ = ["PARAMETERS", "describe_parameters"]

PARAMETERS = "Parameters:"


def describe_parameters(obj: Any) -> None:
    "Add the docments of a function or class to its docstring, for `help()`."
    try:
        found = docments(obj, full=True)
    except OSError:  # installed without sources
        return
    found.pop("return", None)
    lines = [f"    {name}: {about['docment']}" for name, about in found.items() if about["docment"]]
    if lines:
        obj.__doc__ = "\n".join([inspect.cleandoc(obj.__doc__ or ""), "", PARAMETERS, *lines])
