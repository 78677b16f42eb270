"What the user is told once."

import warnings

from fastai.torch_core import rank_distrib

__all__ = ["Notices"]


class Notices:
    "What is printed or warned of once, though several fits start with the same data."

    def __init__(self) -> None:
        self._given: set[str] = set()

    def say(self, text: str) -> None:
        "Print it, in one of several processes."
        if self._is_new(text) and rank_distrib() == 0:
            print(text)

    def warn(self, text: str) -> None:
        "Warn of it."
        if self._is_new(text):
            warnings.warn(text, stacklevel=3)

    def _is_new(self, text: str) -> bool:
        is_new = text not in self._given
        self._given.add(text)
        return is_new
