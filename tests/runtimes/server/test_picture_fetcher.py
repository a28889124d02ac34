"""Pictures by https: off by default, from allowed domains alone, within bounds, and never from inside the network."""

from __future__ import annotations

import asyncio
import io
import itertools
import ssl
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import trustme
from PIL import Image

from arriero.errors import ArrieroError
from arriero.runtimes.server import picture_fetcher
from arriero.runtimes.server.options import ServerOptions
from arriero.runtimes.server.picture_fetcher import FetchError, PictureFetcher, is_public, public_address
from arriero.runtimes.session import Session
from tests.runtimes.server.conftest import Serve, Served

SHADE = np.full((40, 60, 3), 30, np.uint8)
NAME = "pictures.example"


def png(pixels: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    port = 0
    asked: list[tuple[str, str | None]] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers["Host"]))
        name = self.path.strip("/")
        picture = png(SHADE)
        elsewhere = {"other": "https://other.example/ok", "plain": f"http://{NAME}/ok", "again": "/again"}
        if name in ("ok", "a%20b?c=d"):
            self.answer(picture)
        elif name == "near":
            self.answer(b"", 302, Location="/ok")
        elif name in elsewhere:
            self.answer(b"", 302, Location=elsewhere[name])
        elif name == "chunked":
            self.answer(None, **{"Transfer-Encoding": "chunked"})
            for part in (picture[:50], picture[50:], b""):
                self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
        elif name == "html":
            self.answer(b"<html>", type="text/html")
        elif name == "no-picture":
            self.answer(b"PNG?")
        elif name == "packed":
            self.answer(picture, **{"Content-Encoding": "gzip"})
        elif name == "wide":
            self.answer(png(np.zeros((200, 100, 3), np.uint8)))
        elif name == "endless":
            self.answer(None)
            self.drip(b"x" * 4000, 0)
        elif name == "slow":
            self.answer(None)
            self.drip(b"x", 0.05)
        elif name == "no-head":
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            self.drip(b"X-Y: z\r\n", 0)
        elif name == "nonsense":
            self.wfile.write(b"\0\1\2 nonsense\r\n\r\n")
        else:
            self.answer(b"", 404)
        self.close_connection = True

    def answer(self, content: bytes | None, status: int = 200, type: str = "image/png", **headers: str) -> None:
        self.send_response(status)
        for header, value in {"Content-Type": type, **headers}.items():
            self.send_header(header, value)
        if content is not None:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content or b"")

    def drip(self, part: bytes, seconds: float) -> None:
        for _ in range(10_000):
            try:
                self.wfile.write(part)
            except OSError:
                return
            time.sleep(seconds)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server with TLS for `NAME`, whose certificate is trusted and whose address counts as public; its authority."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(NAME).configure_cert(context)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Handler.asked.clear()
    resolve(monkeypatch, "127.0.0.1")
    monkeypatch.setattr(picture_fetcher, "is_public", lambda address: address == "127.0.0.1")
    yield f"{NAME}:{server.server_port}"
    server.shutdown()
    server.server_close()


def resolve(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> list[str]:
    """Let every name lead to the first of `addresses`, then to the second, and so on; gives the names looked up."""
    names: list[str] = []
    answers = itertools.chain(addresses, itertools.repeat(addresses[-1]))

    async def getaddrinfo(_: Any, host: str, port: int, **__: Any) -> list[Any]:
        names.append(host)
        return [(2, 1, 6, "", (address, port)) for address in next(answers).split()]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)
    return names


def ask(served: Served, url: str, path: str = "/v1/chat/completions") -> httpx.Response:
    body: dict[str, Any] = {"model": "toy", "max_tokens": 4, "temperature": 0}
    text = "What is it?"
    if path.startswith("/v1/messages"):
        parts: list[Any] = [{"type": "image", "source": {"type": "url", "url": url}}, {"type": "text", "text": text}]
    elif path == "/v1/responses":
        parts = [{"type": "input_image", "image_url": url}, {"type": "input_text", "text": text}]
        body = {"model": "toy", "max_output_tokens": 4, "temperature": 0}
    else:
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    field = "input" if path == "/v1/responses" else "messages"
    if path in ("/tokenize", "/v1/messages/count_tokens"):
        body = {"model": "toy"}
    with served.web() as web:
        return web.post(path, json={**body, field: [{"role": "user", "content": parts}]})


def test_a_picture_of_an_allowed_domain_is_seen(
    serve: Serve, toy_session: Session, pictures: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve({"toy": toy_session}, image_domains=(pictures,))
    shown = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    expected = toy_session.generate(shown, [Image.fromarray(SHADE)], max_tokens=4)
    names = resolve(monkeypatch, "127.0.0.1")
    for name in ("ok", "near", "chunked", "a%20b?c=d"):
        answer = ask(served, f"https://{pictures}/{name}")
        assert answer.json()["choices"][0]["message"]["content"] == expected.text, name
    assert ask(served, f"https://{pictures}/ok", "/v1/messages").json()["content"][0]["text"] == expected.text
    output = ask(served, f"https://{pictures}/ok", "/v1/responses").json()["output"]
    assert output[0]["content"][0]["text"] == expected.text
    assert ask(served, f"https://{pictures}/ok", "/tokenize").json()["count"] == expected.prompt_tokens
    assert {host for _, host in Handler.asked} == {pictures}
    assert set(names) == {NAME}
    assert len(names) == len(Handler.asked)  # looked up once for each request


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("https://{}/other", "leads to 'other.example'; this server allows pictures.example"),
        ("https://{}/plain", "neither a data URL nor a plain https URL"),
        ("https://{}/again", "is redirected more than 3 times"),
        ("https://{}/missing", "was answered with status 404"),
        ("https://{}/html", "no image by its type"),
        ("https://{}/packed", "no image by its type"),
        ("https://{}/no-picture", "holds no image that can be read"),
        ("https://{}/wide", "holds an image of 20,000 pixels"),
        ("https://{}/endless", "gave more than 9,000 bytes"),
        ("https://{}/slow", "gave no picture within 0.6 seconds"),
        ("https://{}/no-head", r"gave no picture (RemoteProtocolError)"),
        ("https://{}/nonsense", r"gave no picture (RemoteProtocolError)"),
        ("http://{}/ok", "neither a data URL nor a plain https URL"),
        ("https://user:key@{}/ok", "neither a data URL nor a plain https URL"),
        ("https://{}/a\nb", "neither a data URL nor a plain https URL"),
        ("https://{}.evil.example/ok", "is no URL"),
        ("https://evil.example/{}", "leads to 'evil.example'; this server allows pictures.example"),
        ("https://evil.example#@{}/", "leads to 'evil.example'"),
        ("https://pictures.example/ok", "leads to 'pictures.example'; this server allows pictures.example:"),
        ("https://[::1]:{}/ok", "is no URL"),
        ("file:///etc/passwd", "neither a data URL nor a plain https URL"),
    ],
)
def test_what_may_not_be_fetched_is_refused(
    serve: Serve, toy_session: Session, pictures: str, url: str, sentence: str
) -> None:
    limits = {"most_image_bytes": 9000, "most_image_pixels": 10_000}
    # only the one that is refused for it meets a time that a busy machine may need for any answer
    seconds = 0.6 if "0.6 seconds" in sentence else 60.0
    served = serve({"toy": toy_session}, image_domains=(pictures,), image_seconds=seconds, **limits)
    answer = ask(served, url.format(pictures))
    assert answer.status_code == 400, answer.text
    assert sentence in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == "messages[0].content[0].image_url.url"


def test_a_redirect_stays_on_its_host(serve: Serve, toy_session: Session, pictures: str) -> None:
    served = serve({"toy": toy_session}, image_domains=(pictures, "other.example"))
    answer = ask(served, f"https://{pictures}/other")
    assert (answer.status_code, "is redirected to another host" in answer.text) == (400, True)
    assert [path for path, _ in Handler.asked] == ["/other"]


def test_a_client_that_leaves_ends_the_fetch(serve: Serve, toy_session: Session, pictures: str) -> None:
    served = serve({"toy": toy_session}, image_domains=(pictures,), image_seconds=60.0)
    parts = [{"type": "image_url", "image_url": {"url": f"https://{pictures}/slow"}}]
    body = {"model": "toy", "messages": [{"role": "user", "content": parts}]}
    with served.web() as web, pytest.raises(httpx.ReadTimeout):
        web.post("/v1/chat/completions", json=body, timeout=0.5)
    left = time.monotonic()
    while served.shared.load.count:
        time.sleep(0.01)
    assert time.monotonic() - left < 20
    assert Handler.asked == [("/slow", pictures)]


def test_nothing_is_fetched_where_nothing_is_allowed(served: Served, pictures: str) -> None:
    for path in ("/v1/chat/completions", "/v1/messages", "/v1/messages/count_tokens", "/v1/responses", "/tokenize"):
        answer = ask(served, f"https://{pictures}/ok", path)
        assert (answer.status_code, "this server fetches nothing" in answer.text) == (400, True)
    assert Handler.asked == []


def test_the_certificate_must_be_the_hosts_own(
    serve: Serve, toy_session: Session, pictures: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = pictures.partition(":")[2]
    served = serve({"toy": toy_session}, image_domains=(f"other.example:{port}",))
    answer = ask(served, f"https://other.example:{port}/ok")
    assert (answer.status_code, "(SSLCertVerificationError)" in answer.text) == (400, True)
    assert Handler.asked == []


def test_a_name_whose_address_changes_leads_nowhere_else(pictures: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The address that was checked is the one connected to: the second answer is never asked for."""
    monkeypatch.setattr(picture_fetcher, "is_public", lambda address: address == "127.0.0.1")
    fetcher = PictureFetcher(ServerOptions(image_domains=(pictures,)))
    names = resolve(monkeypatch, "127.0.0.1", "10.0.0.1")
    assert asyncio.run(fetcher.fetch(f"https://{pictures}/ok", 9000)) == png(SHADE)
    assert names == [NAME]
    with pytest.raises(FetchError, match="not public"):
        asyncio.run(fetcher.fetch(f"https://{pictures}/ok", 9000))
    resolve(monkeypatch, "127.0.0.1 10.0.0.1")
    with pytest.raises(FetchError, match="not public"):
        asyncio.run(fetcher.fetch(f"https://{pictures}/ok", 9000))


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.9.9.9", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0"),
        *("100.64.0.1", "224.0.0.1", "255.255.255.255", "192.0.2.1", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1"),
        *("ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:db8::1"),
    ],
)
def test_addresses_inside_the_network_are_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_public(address)
    resolve(monkeypatch, f"8.8.8.8 {address}")
    with pytest.raises(FetchError, match="not public"):
        asyncio.run(public_address("example.org", 443))


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_addresses_are_not(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve(monkeypatch, address)
    assert asyncio.run(public_address("example.org", 443)) == address


@pytest.mark.parametrize("domain", ["", "*", "10.0.0.1", "[::1]", "localhost", "https://example.org", "Example.org"])
def test_what_is_no_domain_cannot_be_allowed(domain: str) -> None:
    with pytest.raises(ArrieroError, match="is no domain to allow images from"):
        ServerOptions(image_domains=(domain,))
