"""What to say about an exception that ends a rank: one line."""

from __future__ import annotations

import os
import sys
import traceback

from resmoe_dist.errors import (
    DisagreementError,
    FailedCheckError,
    OptionError,
    UserError,
    first_line,
)

USER_ERROR = 2
UNEXPECTED = 1
# With this variable set, failures are printed with a traceback.
TRACEBACK = "RESMOE_TRACEBACK"
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "std::bad_alloc")
# What torch's collectives say on a rank whose peer has ended, besides raising a DistError.
_LOST_PEER = (
    *("gloo", "NCCL", "ProcessGroup", "TCPStore", "store->get"),
    *("Connection closed by peer", "Connection reset by peer", "recvValue failed", "Broken pipe"),
)


def exit_code(error: Exception) -> int:
    """Exit code for an exception: 2 for invalid input, else 1."""
    return USER_ERROR if isinstance(error, UserError) else UNEXPECTED


def describe(error: Exception, rank: int | None = None, *, joined: bool = True) -> str:
    """The text to print for an exception.

    rank: of this process, None if it is alone. joined: whether the rank has joined the others; the
    mistakes that rank 0 finds before are mistakes of all ranks as a rule. An unexpected error of a
    single process comes with its traceback.
    """
    prefix = "error: " if rank is None else f"error: rank {rank}: "
    if isinstance(error, UserError):
        # Of other mistakes that all ranks make before they join, rank 0 reports its own as a rule.
        of_all = isinstance(error, OptionError | DisagreementError)
        alike = of_all or (not joined and not rank)
        line = f"error: {error}" if alike else f"{prefix}{error}"
        return f"{traceback.format_exc()}{line}" if os.environ.get(TRACEBACK) else line
    if isinstance(error, FailedCheckError):
        return f"error: {error}"
    if is_out_of_memory(error):
        return (
            f"{prefix}out of memory ({first_line(error)}); use more ranks (--ep, --tp), fewer "
            "prompts at once, or a smaller --keep"
        )
    if rank is None:
        return traceback.format_exc().rstrip()
    place = traceback.extract_tb(error.__traceback__)[-1:]
    where = "".join(f" ({os.path.basename(each.filename)}:{each.lineno})" for each in place)
    line = f"error: rank {rank} failed: {type(error).__name__}: {first_line(error)}{where}"
    if os.environ.get(TRACEBACK):
        return f"{traceback.format_exc()}{line}"
    return f"{line}; {TRACEBACK}=1 shows the traceback"


def may_be_lost_peer(error: Exception) -> bool:
    """Whether the reason of an exception may be that another rank has ended."""
    if isinstance(error, UserError):
        return False
    distributed = sys.modules.get("torch.distributed")
    if distributed and isinstance(error, distributed.DistError):
        return True
    return any(part in str(error) for part in _LOST_PEER)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception says that memory ran out, of the host or of a device."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in _OUT_OF_MEMORY)
