"""Classes by name, with typed options: codecs and compression methods register themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from resmoe_dist.validation import reason_of

T = TypeVar("T")
Registered = TypeVar("Registered", bound=type)


class Registry(Generic[T]):
    """Classes of one kind, each under its attribute `name`.

    Their attribute `config` is the pydantic model of their options. kind: what the classes are
    called in messages.
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

    def options(self, name: str, given: dict[str, Any]) -> Any:
        """Options of the class called `name`: an instance of its `config`, defaults filled in.

        Raises ValueError for an unknown name, option or value.
        """
        registered: Any = self.named(name)
        try:
            return registered.config.model_validate(given)
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{self.kind} {name}: {_problem(registered.config, first)}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._classes)

    def __contains__(self, name: object) -> bool:
        return name in self._classes

    def __len__(self) -> int:
        return len(self._classes)


def parse_name_and_options(text: str) -> tuple[str, dict[str, str]]:
    """`NAME` or `NAME:option=value,option=value`, as users write it. Raises ValueError."""
    name, _, rest = text.partition(":")
    options = {}
    for part in filter(None, rest.split(",")):
        option, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"{text!r}: write NAME:option=value,option=value")
        options[option.strip()] = value.strip()
    return name.strip(), options


def _problem(config: type[BaseModel], error: ErrorDetails) -> str:
    """What is wrong with one option, and what to write instead."""
    option = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        known = ", ".join(config.model_fields) or "none"
        return f"no option {option}; its options: {known}"
    if error["type"] == "missing":
        return f"option {option} is missing; give {option}=VALUE"
    return f"{option} {error['input']}: {reason_of(error)}" if option else reason_of(error)
