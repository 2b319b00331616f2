"""pydantic's errors in this project's words.

Must stay cheap to import: configurations are built before anything else.
"""

from __future__ import annotations

from pydantic_core import ErrorDetails


def reason_of(error: ErrorDetails) -> str:
    """Why a value is wrong, without naming the value: "not a whole number"."""
    context = error.get("ctx", {})
    bounds = {name: f"{context[name]:g}" for name in ("gt", "ge", "lt", "le") if name in context}
    reasons = {
        "literal_error": f"choose one of {str(context.get('expected', '')).replace(chr(39), '')}",
        "float_parsing": "not a number",
        "float_type": "not a number",
        "int_parsing": "not a whole number",
        "int_type": "not a whole number",
        "int_from_float": "not a whole number",
        "bool_parsing": "write true or false",
        "bool_type": "write true or false",
        "path_type": "not a path",
        "string_type": "not text; put it in quotes",
        "list_type": "not a list",
        "greater_than": f"must be above {bounds.get('gt')}",
        "greater_than_equal": f"must be {bounds.get('ge')} or more",
        "less_than": f"must be below {bounds.get('lt')}",
        "less_than_equal": f"must be {bounds.get('le')} or less",
        "multiple_of": f"must be a multiple of {context.get('multiple_of')}",
        "value_error": str(context.get("error", "")),
    }
    return reasons.get(error["type"]) or str(error["msg"]).lower()
