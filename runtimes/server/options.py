"""What a server allows, with defaults that are safe: this machine alone, and limits on all that a request may cost."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from arriero.errors import ArrieroError

DOMAIN = re.compile(r"(?=.{4,253}$)([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z][a-z0-9-]*[a-z0-9](:[0-9]{1,5})?")


@dataclass(frozen=True)
class ServerOptions:
    """Where to listen, who may ask, and how much.

    `api_key` is asked for on every path but /health, and must be set beyond this machine. `most_requests` answers may
    be on their way at once, those that wait included; `most_tokens` bounds one answer (None: the context does).
    Pictures are fetched from `image_domains` alone, each a host name, with a port where that is not 443.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    most_requests: int = 64
    most_tokens: int | None = None
    most_body_bytes: int = 32 << 20
    most_images: int = 16
    most_image_bytes: int = 16 << 20
    most_image_pixels: int = 1 << 24
    image_domains: tuple[str, ...] = ()
    image_seconds: float = 10.0  # to fetch one
    most_answers: int = 8  # to one request, as `n` asks for them
    request_seconds: float = 600.0
    body_seconds: float = 30.0
    stop_seconds: float = 30.0  # for answers on their way when the server is told to stop

    def __post_init__(self) -> None:
        if self.api_key is not None and (not self.api_key or not self.api_key.isascii()):
            raise ArrieroError("the API key is empty or has letters beyond ASCII", expected="letters and digits")
        for domain in self.image_domains:
            if not DOMAIN.fullmatch(domain):
                raise ArrieroError(
                    f"{domain!r} is no domain to allow images from",
                    expected="a host name in small ASCII letters, such as example.org or example.org:8443",
                )
        if not self.is_local and self.api_key is None:
            raise ArrieroError(
                f"whoever reaches {self.host} could use the model without a key",
                where="host",
                expected="an API key, or an address of this machine alone, such as 127.0.0.1",
                remedy="Set the environment variable ARRIERO_API_KEY, or pass --api-key-file",
            )

    @property
    def is_local(self) -> bool:
        """Whether only programs on this machine reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
