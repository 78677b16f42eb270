"Docstrings that show in a terminal what the comments beside the parameters say."

import inspect
from typing import Any

from fastcore.docments import docments

__all__ = ["PARAMETERS", "describe_parameters"]

PARAMETERS, VAR_KEYWORD = "Parameters:", inspect.Parameter.VAR_KEYWORD


def describe_parameters(obj: Any) -> None:
    "Add the docments of a function, or of a class and its methods, to the docstrings, for `help()`."
    try:
        found = docments(obj, full=True)
    except OSError:  # installed without sources
        return
    of_kwargs = found.pop("return", {}).get("docment")  # fastcore takes the comment beside **kwargs for the result's
    about = {name: its["docment"] or (of_kwargs if its["kind"] is VAR_KEYWORD else None) for name, its in found.items()}
    lines = [f"    {name}: {text}" for name, text in about.items() if text]
    if lines:
        obj.__doc__ = "\n".join([inspect.cleandoc(obj.__doc__ or ""), "", PARAMETERS, *lines])
    if inspect.isclass(obj):
        for name, method in vars(obj).items():
            if inspect.isfunction(method) and not name.startswith("_") and PARAMETERS not in (method.__doc__ or ""):
                describe_parameters(method)
