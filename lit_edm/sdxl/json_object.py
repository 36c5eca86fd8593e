"""JSON that strangers wrote."""

import json
from typing import Any


def read_object(text: str) -> dict[str, Any]:
    """Returns a JSON object.

    Raises:
        ValueError: It is no JSON, or not an object, or nested deeper than Python can follow.
    """
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError("it is not an object")
    return found
