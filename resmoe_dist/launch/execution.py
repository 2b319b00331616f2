"""The execution that a command's options ask for."""

from __future__ import annotations

from resmoe_dist.config.grid import ExecutionConfig
from resmoe_dist.errors import UserError
from resmoe_dist.runtime.execution import Execution
from resmoe_dist.runtime.planning import execution_for


def execution_of(config: ExecutionConfig) -> Execution:
    """The execution called `--execution`. Raises UserError for an unknown name."""
    try:
        return execution_for(config.execution, config.cache_size or 0)
    except ValueError as error:
        raise UserError(f"--{error}") from error
