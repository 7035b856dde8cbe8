"""The key of an OpenAI-compatible endpoint: read from the environment, and never shown or written."""

import html
import json
import os
import re
from urllib.parse import quote

KEY_VARIABLE = "NPO_ENDPOINT_KEY"


def read_key() -> str:
    """The key; empty without one."""
    return os.environ.get(KEY_VARIABLE, "").strip()


def redact_key(text: str, *, min_length: int = 1) -> str:
    """The text without the key, which servers echo plain or escaped, in their headers, errors and responses."""
    key = read_key()
    if len(key) < min_length or not key:
        return text
    forms = {key, json.dumps(key)[1:-1], repr(key)[1:-1], html.escape(key), quote(key), quote(key, safe="")}
    pattern = "|".join(re.escape(form) for form in sorted(forms, key=len, reverse=True))
    return re.sub(pattern, "[key]", text, flags=re.IGNORECASE)
