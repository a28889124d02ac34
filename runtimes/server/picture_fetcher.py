"""Pictures that a request names by https, from the domains that a server allows and from no others.

A name is looked up once and the connection goes to an address that was checked, so that a name whose address changes
in between leads nowhere else. Addresses of this machine and of local networks are refused, whatever name leads there.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

import h11

from arriero.runtimes.server.options import ServerOptions

HTTPS = 443
MOST_REDIRECTS = 3
AT_ONCE = 4  # fetches, of all requests together
HEAD_BYTES, READ_BYTES = 16 << 10, 64 << 10
NAT64 = ipaddress.ip_network("64:ff9b::/96")


class FetchError(Exception):
    """Why there is no picture, as the end of a sentence that begins with its field."""


@dataclass(frozen=True)
class Place:
    """Where a URL leads: a host and port that are allowed, and what to ask there for."""

    host: str
    port: int
    target: str

    @property
    def authority(self) -> str:
        """The host, with the port where it is not https' own."""
        return self.host if self.port == HTTPS else f"{self.host}:{self.port}"


class PictureFetcher:
    """Fetches pictures within the limits of a server's options."""

    def __init__(self, options: ServerOptions) -> None:
        """Allow the domains of `options`."""
        self._options, self._slots = options, asyncio.Semaphore(AT_ONCE)
        self._tls = ssl.create_default_context() if options.image_domains else None

    def place(self, url: str) -> Place:
        """Where `url` leads; FetchError where that is not allowed."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port or HTTPS
        except ValueError:
            raise FetchError("is no URL") from None
        place = Place(host, port, (parts.path or "/") + (f"?{parts.query}" if parts.query else ""))
        if parts.scheme != "https" or parts.username is not None or not url.isascii() or not url.isprintable():
            raise FetchError("is neither a data URL nor a plain https URL")
        if place.authority not in self._options.image_domains:
            raise FetchError(f"leads to {place.authority[:60]!r}; this server allows {self.allowed}")
        return place

    @property
    def allowed(self) -> str:
        """The domains in words."""
        return ", ".join(self._options.image_domains)

    async def fetch(self, url: str, most: int) -> bytes:
        """The content behind `url`, at most `most` bytes; FetchError where there is none."""
        seconds = self._options.image_seconds
        async with self._slots:
            try:
                async with asyncio.timeout(seconds):
                    return await self._follow(url, most)
            except TimeoutError:
                raise FetchError(f"gave no picture within {seconds:g} seconds") from None
            except (OSError, h11.RemoteProtocolError, h11.LocalProtocolError) as error:
                raise FetchError(f"gave no picture ({type(error).__name__})") from None

    async def _follow(self, url: str, most: int) -> bytes:
        place = self.place(url)
        for _ in range(MOST_REDIRECTS + 1):
            answer = await self._ask(place, most)
            if isinstance(answer, bytes):
                return answer
            url = urljoin(url, answer)
            if self.place(url).authority != place.authority:
                raise FetchError("is redirected to another host")
            place = self.place(url)
        raise FetchError(f"is redirected more than {MOST_REDIRECTS} times")

    async def _ask(self, place: Place, most: int) -> bytes | str:
        """The content at `place`, or the URL that it redirects to."""
        address = await public_address(place.host, place.port)
        reader, writer = await asyncio.open_connection(address, place.port, ssl=self._tls, server_hostname=place.host)
        try:
            connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD_BYTES)
            headers = [("Host", place.authority), ("User-Agent", "arriero"), ("Accept", "image/*")]
            headers += [("Accept-Encoding", "identity"), ("Connection", "close")]
            request = h11.Request(method="GET", target=place.target, headers=headers)
            writer.write((connection.send(request) or b"") + (connection.send(h11.EndOfMessage()) or b""))
            content = bytearray()
            while True:
                event = connection.next_event()
                if event is h11.NEED_DATA:
                    connection.receive_data(await reader.read(READ_BYTES))
                elif isinstance(event, h11.Response):
                    if (location := _location(event)) is not None:
                        return location
                elif isinstance(event, h11.Data):
                    content += event.data
                    if len(content) > most:
                        raise FetchError(f"gave more than {most:,} bytes")
                elif isinstance(event, h11.EndOfMessage):
                    return bytes(content)
        finally:
            writer.transport.abort()


def _location(response: h11.Response) -> str | None:
    """Where a response redirects to, None for one that brings a picture; FetchError for any other."""
    headers = {name.lower(): value.decode("latin-1") for name, value in response.headers}
    if response.status_code in (301, 302, 303, 307, 308) and b"location" in headers:
        return headers[b"location"]
    if response.status_code != 200:
        raise FetchError(f"was answered with status {response.status_code}")
    kind, coding = headers.get(b"content-type", ""), headers.get(b"content-encoding", "identity")
    if not kind.startswith("image/") or coding != "identity":
        raise FetchError("gave something that is no image by its type")
    return None


async def public_address(host: str, port: int) -> str:
    """The first address of `host`; FetchError where any of them is not one of the public network's."""
    entries = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in entries]
    if not addresses or not all(map(is_public, addresses)):
        raise FetchError("leads to an address that is not public")
    return addresses[0]


def is_public(address: str) -> bool:
    """Whether an address, and the one that it may carry inside, is one of the public network's."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    inside: list[ipaddress.IPv4Address | None] = []
    if isinstance(ip, ipaddress.IPv6Address):
        inside = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if ip in NAT64:
            inside.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
    carried = [one for one in inside if one is not None]
    if carried:
        return all(is_public(str(one)) for one in carried)
    return ip.is_global and not ip.is_multicast
