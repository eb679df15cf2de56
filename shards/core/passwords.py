"""Passwords in the URLs of datasets: they are used for reading, but never written to files or logs.

A URL such as https://me:secret@host/data?token=secret is stored as https://host/data. The removed parts are kept in
memory, and in the environment of this process for its child processes.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any
from urllib.parse import parse_qsl, unquote

_VARIABLE = "SLIM_URLS"  # {URL without secrets: [user, password or null, query]}
# scheme, user, password, host with path, query
_URL = re.compile(
    r"([A-Za-z][A-Za-z0-9+.-]*://)(?:([^/?#@:\s]*)(?::([^/?#\s]*))?@)?([^?#\s]*)(?:\?([^#\s]*))?.*", re.DOTALL
)
# an argument of a command that is a URL, perhaps after `--data=` or `data=`
_WORD = re.compile(r"(?P<before>[\w.-]+=)?(?P<url>[A-Za-z][A-Za-z0-9+.-]*://.*)", re.DOTALL)
_SHORTEST = 3  # shortest secret, in characters, that is searched for in texts


def keep(url: str) -> str:
    """Remove password and query from a URL, and remember them. Other text is returned unchanged."""
    found = _URL.fullmatch(url)
    if found is None:
        return url
    scheme, user, password, rest, query = found.groups()
    if password is None and not query:
        return url
    # for http and s3, the user is passed with the password, not in the URL
    bare = f"{scheme}{rest}" if scheme.startswith(("http", "s3")) or not user else f"{scheme}{user}@{rest}"
    os.environ[_VARIABLE] = json.dumps({**_kept(), bare: [user, password, query]})
    return bare


def keep_in_word(word: str) -> str:
    """An argument of a command without password and query, if it is a URL, `--option=URL` or `key=URL`; see `keep`."""
    found = _WORD.fullmatch(word)
    return word if found is None else f"{found['before'] or ''}{keep(found['url'])}"


def options(url: str) -> dict[str, Any]:
    """The options with which fsspec opens a URL: the password and query that were removed from it."""
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
    """Remove remembered passwords, and passwords and queries of URLs, from a text."""
    for _, password, query in _kept().values():
        values = [value for _, value in parse_qsl(query or "")]
        secrets = {*values, query or "", password or "", unquote(password or "")}
        for secret in sorted(secrets, key=len, reverse=True):
            if len(secret) >= _SHORTEST:
                text = text.replace(secret, "***")
    text = re.sub(r"(\w://[^/?#@:\s]*):[^/?#@\s]+@", r"\1:***@", text)
    return re.sub(r"(\w://[^?#\s]*\?)[^#\s]*=[^#\s'\",\])]*", r"\1***", text)


def _kept() -> dict[str, list[str | None]]:
    text = os.environ.get(_VARIABLE)
    return json.loads(text) if text else {}
