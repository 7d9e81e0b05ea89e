"""Passwords and tokens in URIs, masked wherever a URI is written or shown."""

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote_plus

MASK = "***"
_URI = (
    re.compile(r"(?P<scheme>[A-Za-z][\w+.-]*://)(?P<user>[^\s/?#:\[\]]*)(?P<password>:.*)?@"),
    re.compile(r"(?P<before>[?&;#])(?P<name>[\w.%+~-]+)=(?P<value>[^&#]+)"),
)
"""user:password@ before a host, and the parameters, of a text that is one URI. A password may hold what belongs quoted:
the last @ ends it, as SQLAlchemy reads it."""
_AMONG_WORDS = (
    re.compile(r"""(?P<scheme>[A-Za-z][\w+.-]*://)(?P<user>[^\s/?#"'<>:\[\]]*)(?P<password>:[^\s"'<>]*)?@"""),
    re.compile(r"""(?P<before>[?&;#])(?P<name>[\w.%+~-]+)=(?P<value>[^\s&;#"'<>]+)"""),
)
"""The same in a text that has URIs in it."""
_PORT = re.compile(r":\d{1,5}[/?#\s]")
_SECRET = re.compile(
    r"pass(word|wd|phrase|code)?$|pwd$|password|secret|token|credential|signature|^sig$|^auth$|api_?key|access_?key"
    r"|account_?key|private_?key|^key$|odbc_connect|jwt|bearer"
)
_ONLY_USER = ("http://", "https://", "git+https://", "git+http://")
"""Where a user without a password is a token."""


def mask(text: str) -> str:
    """A text with the passwords, tokens and keys of every URI in it replaced by `***`."""
    if "://" not in text:
        return text
    user, parameter = _URI if re.match(r"[A-Za-z][\w+.-]*://", text) else _AMONG_WORDS
    return parameter.sub(_masked_parameter, user.sub(_masked_user, text))


def mask_all(value: Any) -> Any:
    """The same for every text in lists and mappings."""
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, Mapping):
        return {key: mask_all(item) for key, item in value.items()}
    return [mask_all(item) for item in value] if isinstance(value, (list, tuple)) else value


def _masked_user(found: re.Match[str]) -> str:
    scheme, user, password = found["scheme"], found["user"], found["password"]
    web = scheme.lower() in _ONLY_USER
    if password and not ((web or "@" in user) and _PORT.match(password)):  # else a port, and an @ further on
        return f"{scheme}{user}:{MASK}@"
    return f"{scheme}{MASK}@" if web and user and not password else found[0]


def _masked_parameter(found: re.Match[str]) -> str:
    name = unquote_plus(found["name"]).lower().replace("-", "_")
    return f"{found['before']}{found['name']}={MASK}" if _SECRET.search(name) else found[0]
