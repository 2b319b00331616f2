"""Classes found by the name they declare, such as codecs and methods, with typed options."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import ValidationError

Item = TypeVar("Item")
Decorated = TypeVar("Decorated", bound=type)


class Registry(dict[str, type[Item]]):
    """Classes by their `name`, each with a pydantic model of its options as `config`.

    kind: what the classes are, for error messages.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def register(self, item: Decorated) -> Decorated:
        """Class decorator: make a class available under its name, everywhere."""
        registered: Any = item
        self[registered.name] = registered
        return item

    def named(self, name: str) -> type[Item]:
        """The class called `name`. Raises ValueError for an unknown name."""
        if name not in self:
            raise ValueError(f"unknown {self.kind} {name!r}; choose one of {', '.join(self)}")
        return self[name]

    def options(self, name: str, options: dict[str, Any]) -> Any:
        """`options` as the config of the class called `name`, defaults filled in.

        Raises ValueError for an unknown name, option or value.
        """
        registered: Any = self.named(name)
        try:
            return registered.config.model_validate(options)
        except ValidationError as error:
            first = error.errors()[0]
            option = ".".join(map(str, first["loc"])) or "options"
            raise ValueError(f"{self.kind} {name}: {option}: {first['msg'].lower()}") from error
