"""Classes by name: codecs and compression methods register themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Registered = TypeVar("Registered", bound=type)


class Registry(Generic[T]):
    """Classes of one kind, each under its attribute `name`.

    kind: what they are called in messages.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._classes: dict[str, Any] = {}

    def register(self, registered: Registered) -> Registered:
        """Class decorator: make a class available under its name, everywhere."""
        self._classes[registered.name] = registered  # type: ignore[attr-defined]
        return registered

    def named(self, name: str) -> type[T]:
        """The class called `name`. Raises ValueError, which names the others, if it is unknown."""
        if name not in self._classes:
            raise ValueError(f"unknown {self.kind} {name!r}; choose one of {', '.join(self)}")
        return self._classes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._classes)

    def __contains__(self, name: object) -> bool:
        return name in self._classes

    def __len__(self) -> int:
        return len(self._classes)
