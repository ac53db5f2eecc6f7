"""Redaction of secrets in messages: credentials in URLs, signed queries and tokens.

Errors, logs and reports quote users' words, the environment, and HTTP clients' messages about both.
Knows only texts, not their origin.
"""

import base64
import os
import re
from collections.abc import Iterator
from urllib.parse import quote, unquote

HIDDEN = "***"
"""Replacement of a secret."""

# A path turns a URL into `https:/host`. Of bounded length, since a stranger's text is long.
_SCHEME = re.compile(
    r"(?<![a-z0-9+.-])[a-z][a-z0-9+.-]{1,20}://+|"
    r"\b(?:https?|ftps?|sftp|ssh|git|s3|gs|gcs|az|abfss?|hdfs|hf|webdavs?|smb|wss?|socks[45]h?):/",
    re.IGNORECASE,
)
_END = re.compile(r'[\s"<>]')
_CLOSING = ")]}.,;:'"
# After this colon comes a password, not a port; so a `/` after it does not end the host.
_PASSWORD = re.compile(r"[^:\[]*:(?!\d*$)")
_QUERY_SECRET = re.compile(
    r"([?&][\w.-]*(?:token|signature|secret|password|passwd|api_?key|credential|sig)=)[^\s&\"'<>]+",
    re.IGNORECASE,
)
_HEADER = re.compile(
    r"(authorization\W{1,6}(?:(?:bearer|basic|token) +)?)[^\s'\",]+", re.IGNORECASE
)
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
_CLUES = (":/", "hf_", "=", "uthorization")

_TOKEN_VARIABLES = (
    *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN"),
    *("HUGGINGFACE_TOKEN", "HUGGINGFACEHUB_API_TOKEN"),
)
_LEAST_TOKEN = 8  # shorter ones are words that a path may have


def without_secrets(text: str) -> str:
    """Return a text without the user information and queries of URLs, and without tokens.

    Example:
        >>> without_secrets("https://me:secret@host/x?token=1 is down")
        'https://***@host/x?*** is down'
    """
    for variable in _TOKEN_VARIABLES:
        token = os.environ.get(variable, "").strip()
        if len(token) >= _LEAST_TOKEN:
            text = text.replace(token, HIDDEN)
    if not any(clue in text for clue in _CLUES):
        return text
    text = "".join(_bare_urls(text))
    text = _QUERY_SECRET.sub(rf"\1{HIDDEN}", text)
    text = _HEADER.sub(rf"\1{HIDDEN}", text)
    return _TOKEN.sub(f"hf_{HIDDEN}", text)


def without_environment(text: str) -> str:
    """Return another library's text without any part of the credentials in the environment's URLs.

    It may quote a password without its URL: "Invalid port: 'secret'".
    """
    text = without_secrets(text)
    for secret in _environment_secrets():
        text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", HIDDEN, text)
    return text


def without_user(address: str) -> str:
    """Return an address without its user, even if it has no scheme.

    Only for texts that cannot be paths: `a:b@c` may be the name of a file.
    """
    if not is_url(address) and re.match(r"[^/@:\s]*:[^@]*@", address):
        return f"{HIDDEN}@{address.rpartition('@')[2]}"
    return without_secrets(address)


def is_url(address: str) -> bool:
    """Return True for a URL, and for a path made of one (`https:/host`)."""
    return _SCHEME.match(address) is not None


def _bare_urls(text: str) -> Iterator[str]:
    """Yield a text in pieces. A URL ends at the next one, if nothing else ends it."""
    schemes = list(_SCHEME.finditer(text))
    position = 0
    for number, scheme in enumerate(schemes, start=1):
        end = schemes[number].start() if number < len(schemes) else len(text)
        stop = _END.search(text, scheme.end(), end)
        yield text[position : scheme.end()]
        position = end if stop is None else stop.start()
        yield _bare_rest(text[scheme.end() : position])
    yield text[position:]


def _bare_rest(rest: str) -> str:
    """Return the part after a URL's scheme without user information and query."""
    host = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if "@" in host:
        rest = f"{HIDDEN}@{rest[host.rindex('@') + 1 :]}"
    elif "@" in rest and _PASSWORD.match(host):
        rest = f"{HIDDEN}@{rest.rpartition('@')[2]}"
    found = re.search(r"[?#]", rest)
    if found is not None:
        query = rest[found.end() :]
        closing = query[len(query.rstrip(_CLOSING)) :]
        rest = f"{rest[: found.end()]}{HIDDEN}{closing}"
    return rest


def _environment_secrets() -> list[str]:
    """Return the user information in URLs of the environment, the longest part first."""
    found: set[str] = set()
    for name, value in os.environ.items():
        if "@" in value and name.upper().endswith(("ENDPOINT", "PROXY", "URL", "URI", "MIRROR")):
            user_info = value.partition("://")[2] or value
            user, _, password = user_info.rpartition("@")[0].partition(":")
            found |= _spellings(password or user)
            if password:
                joined = f"{unquote(user)}:{unquote(password)}"
                found.add(base64.b64encode(joined.encode()).decode())
    return sorted(filter(None, found), key=len, reverse=True)


def _spellings(secret: str) -> set[str]:
    """Return the forms of a secret: whole, decoded, encoded, or cut at a URL's separators."""
    whole = {secret, unquote(secret), quote(unquote(secret), safe="")}
    parts = {part for spelling in whole for part in re.split(r"[/?#@:]", spelling)}
    return whole | {part for part in parts if len(part) > 1}
