"""Passwords in the URLs of datasets: used to read them, and written nowhere.

A URL such as https://me:secret@host/data?token=secret is kept as https://host/data from where it is read. What was
taken out of it stays in memory, and in the environment of this process for those it starts.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any
from urllib.parse import parse_qsl, unquote

_VARIABLE = "SLIM_URLS"  # {URL without: [user, password or null, query]}
# scheme, user, password, host with path, query
_URL = re.compile(
    r"([A-Za-z][A-Za-z0-9+.-]*://)(?:([^/?#@:\s]*)(?::([^/?#\s]*))?@)?([^?#\s]*)(?:\?([^#\s]*))?.*", re.DOTALL
)
_SHORTEST = 3  # letters of a secret that is looked for in text


def keep(url: str) -> str:
    """A URL without the password and the query in it, which are remembered; any other text as it is."""
    found = _URL.fullmatch(url)
    if found is None:
        return url
    scheme, user, password, rest, query = found.groups()
    if password is None and not query:
        return url
    # of http and s3 the user is told beside the URL, with the password
    bare = f"{scheme}{rest}" if scheme.startswith(("http", "s3")) or not user else f"{scheme}{user}@{rest}"
    os.environ[_VARIABLE] = json.dumps({**_kept(), bare: [user, password, query]})
    return bare


def options(url: str) -> dict[str, Any]:
    """What fsspec is told beside a URL without its password: as much as was kept of it."""
    kept = next((about for bare, about in _kept().items() if f"{url}/".startswith(bare.rstrip("/") + "/")), None)
    if kept is None:
        return {}
    user, password, query = kept
    user, password = unquote(user or ""), unquote(password or "")
    if url.startswith(("http://", "https://")):
        found: dict[str, Any] = {}
        if password:
            from aiohttp import BasicAuth

            found["client_kwargs"] = {"auth": BasicAuth(user, password)}
        return {**found, "params": dict(parse_qsl(query))} if query else found
    names = ("key", "secret") if url.startswith("s3") else ("username", "password")
    return dict(zip(names, (user, password), strict=True)) if password else {}


def hidden(text: str) -> str:
    """Text without the passwords that were kept, and without that of any URL in it."""
    for _, password, query in _kept().values():
        values = [value for _, value in parse_qsl(query or "")]
        secrets = {*values, query or "", password or "", unquote(password or "")}
        for secret in sorted(secrets, key=len, reverse=True):
            if len(secret) >= _SHORTEST:
                text = text.replace(secret, "***")
    return re.sub(r"(\w://[^/?#@:\s]*):[^/?#@\s]+@", r"\1:***@", text)


def _kept() -> dict[str, list[str | None]]:
    text = os.environ.get(_VARIABLE)
    return json.loads(text) if text else {}
