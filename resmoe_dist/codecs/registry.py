"""Codecs by name, and a codec with its options as users write them and settings store them."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator
from typing_extensions import Self

from resmoe_dist.codecs.base import BudgetConfig, CodecConfig, EncodedMatrix
from resmoe_dist.registry import Registry, parse_name_and_options

CODECS: Registry[EncodedMatrix] = Registry("codec")
register_codec = CODECS.register
codec_named = CODECS.named


class CodecSpec(BaseModel):
    """A codec and its options: `{"name": "pruned", "options": {"keep": 0.25}}`.

    Raises ValueError (pydantic's ValidationError) for an unknown codec, option or value.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    options: dict[str, Any] = {}

    @model_validator(mode="after")
    def _complete(self) -> Self:
        # Defaults are written out, so that a checkpoint records all options that made it.
        config = CODECS.options(self.name, self.options)
        self.options.update(config.model_dump(exclude_none=True))
        return self

    @classmethod
    def parse(cls, text: str) -> Self:
        """From `NAME` or `NAME:option=value,option=value`. Raises ValueError if malformed."""
        name, options = parse_name_and_options(text)
        return cls(name=name, options=options)

    @cached_property
    def codec(self) -> type[EncodedMatrix]:
        """The class."""
        return codec_named(self.name)

    @cached_property
    def config(self) -> CodecConfig:
        """Its typed options."""
        return self.codec.config.model_validate(self.options)

    @property
    def keep(self) -> float | None:
        """Share of the entries kept; None for codecs without such a budget."""
        return self.config.keep if isinstance(self.config, BudgetConfig) else None

    def for_blocks(self, blocks: int) -> Self:
        """The same codec for matrices of so many projections."""
        config = self.config.for_blocks(blocks)
        return type(self)(name=self.name, options=config.model_dump(exclude_none=True))

    def with_bits(self, bits: int) -> Self:
        """The same codec with so many bits per entry, for codecs that spend bits."""
        assert self.codec.spends_bits
        config: Any = self.config
        options = config.with_bits(bits).model_dump(exclude_none=True)
        return type(self)(name=self.name, options=options)

    def with_keep(self, keep: float) -> Self:
        """The same codec with another budget. Raises ValueError for codecs without a budget."""
        if not isinstance(self.config, BudgetConfig):
            raise ValueError(f"codec {self.name} has no option keep")
        return type(self)(name=self.name, options={**self.options, "keep": keep})
