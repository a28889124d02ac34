"""The pictures of a request, as entries of messages; their sizes are looked at before anything is decoded."""

from __future__ import annotations

import base64
import binascii
from typing import Any

from PIL import Image

from arriero.runtimes.processor.picture_file import EXPECTED, open_picture
from arriero.runtimes.server.fields import Fields
from arriero.runtimes.server.options import ServerOptions
from arriero.runtimes.server.picture_fetcher import FetchError, PictureFetcher


class PictureReader:
    """Reads the pictures of one request."""

    def __init__(self, options: ServerOptions) -> None:
        """Keep to the limits of `options` over all pictures together."""
        self._options, self._count = options, 0
        self._elsewhere: list[tuple[dict[str, Any], Fields, str, str]] = []

    def entry(self, fields: Fields, name: str, url: str) -> dict[str, Any]:
        """The entry of the picture behind a URL, which stands in the field `name`; `fetch` brings what is elsewhere."""
        head, comma, data = url.partition(",")
        if comma and head.startswith("data:image/") and head.endswith(";base64"):
            return self.decoded(fields, name, data)
        if not self._options.image_domains:
            expected = "expected data:image/...;base64,... since this server fetches nothing"
            raise fields.refusal(name, f"is {url[:30]!r}...; {expected}")
        self._count_one(fields, name)
        entry: dict[str, Any] = {"type": "image"}
        self._elsewhere.append((entry, fields, name, url))
        return entry

    async def fetch(self, fetcher: PictureFetcher) -> None:
        """Fetch what is elsewhere, one after the other: all together are no larger than a body that brings them."""
        left = self._options.most_body_bytes
        for entry, fields, name, url in self._elsewhere:
            try:
                picture = await fetcher.fetch(url, min(left, self._options.most_image_bytes))
            except FetchError as error:
                raise fields.refusal(name, str(error)) from None
            self._check(fields, name, picture)
            entry["image"], left = picture, left - len(picture)

    def decoded(self, fields: Fields, name: str, data: str) -> dict[str, Any]:
        """The entry of the picture in base64 `data`."""
        self._count_one(fields, name)
        if len(data) * 3 // 4 > self._options.most_image_bytes:
            raise self._too_large(fields, name)
        try:
            picture = base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError):
            raise fields.refusal(name, "is no base64") from None
        self._check(fields, name, picture)
        return {"type": "image", "image": picture}

    def _count_one(self, fields: Fields, name: str) -> None:
        self._count += 1
        if self._count > self._options.most_images:
            raise fields.refusal(name, f"is one image too many; expected at most {self._options.most_images}")

    def _too_large(self, fields: Fields, name: str) -> Exception:
        return fields.refusal(name, f"holds an image of more than {self._options.most_image_bytes:,} bytes")

    def _check(self, fields: Fields, name: str, picture: bytes) -> None:
        """Refuse what is no picture, or has too many pixels."""
        try:
            with open_picture(picture) as opened:
                pixels = opened.width * opened.height
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            what = f"holds no image that can be read ({type(error).__name__}); expected {EXPECTED}"
            raise fields.refusal(name, what) from None
        most = self._options.most_image_pixels
        if pixels > most:
            raise fields.refusal(name, f"holds an image of {pixels:,} pixels; expected at most {most:,}")
