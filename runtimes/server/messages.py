"""Messages as OpenAI's API has them, made those that the session takes; pictures come in the request or not at all.

Nothing of a message reaches a file or the network: entries are built anew from text and from the bytes of data URLs.
"""

from __future__ import annotations

import base64
import binascii
import io
import warnings
from typing import Any

from PIL import Image

from arriero.runtimes.server.errors import RefusalError
from arriero.runtimes.server.fields import Fields
from arriero.runtimes.server.options import ServerOptions

ROLES = {"developer": "system"}  # roles that are other names of ours


class MessageReader:
    """Reads the messages of one request."""

    def __init__(self, options: ServerOptions) -> None:
        """Keep to the limits of `options` over all messages together."""
        self._pictures = PictureReader(options)

    def read(self, messages: list[Any] | None) -> list[dict[str, Any]]:
        """Give the messages as the session takes them."""
        if not messages:
            raise RefusalError(400, "messages is empty; expected at least one message.", param="messages")
        return [self._message(Fields(message, f"messages[{n}]")) for n, message in enumerate(messages)]

    def _message(self, fields: Fields) -> dict[str, Any]:
        role = fields.text("role")
        if role is None:
            raise fields.refusal("role", "is missing; expected system, user, assistant or tool")
        message: dict[str, Any] = {"role": ROLES.get(role, role)}
        content = fields.take("content")
        calls = fields.items("tool_calls")
        if calls:
            message["tool_calls"] = calls
        if isinstance(content, list):
            where = fields.path("content")
            message["content"] = [self._entry(Fields(entry, f"{where}[{n}]")) for n, entry in enumerate(content)]
        elif isinstance(content, str) or (content is None and calls):
            message["content"] = content
        else:
            raise fields.refusal("content", "is no text; expected a string or a list of parts")
        for name in ("tool_call_id", "name"):
            if (value := fields.text(name)) is not None:
                message[name] = value
        fields.ignore(("refusal", "annotations", "audio", "function_call"))
        fields.refuse_others()
        return message

    def _entry(self, fields: Fields) -> dict[str, Any]:
        kind = fields.text("type")
        if kind == "text":
            text = fields.required_text("text")
            fields.refuse_others()
            return {"type": "text", "text": text}
        if kind == "image_url":
            image = fields.fields("image_url")
            url = None if image is None else image.text("url")
            if image is None or url is None:
                raise fields.refusal("image_url", "is missing; expected an object with a url")
            image.ignore(("detail",))
            image.refuse_others()
            fields.refuse_others()
            return {"type": "image", "image": self._pictures.read_url(image, url)}
        raise fields.refusal("type", f"is {kind!r:.40}; expected text or image_url")


class PictureReader:
    """Reads the pictures of one request, whose sizes are looked at before anything is decoded."""

    def __init__(self, options: ServerOptions) -> None:
        """Keep to the limits of `options` over all pictures together."""
        self._options, self._count = options, 0

    def read_url(self, fields: Fields, url: str) -> bytes:
        """The bytes of the picture in a data URL."""
        head, comma, data = url.partition(",")
        if not (comma and head.startswith("data:image/") and head.endswith(";base64")):
            expected = "expected data:image/...;base64,... since this server fetches nothing"
            raise fields.refusal("url", f"is {url[:30]!r}...; {expected}")
        return self.decode(fields, "url", data)

    def decode(self, fields: Fields, name: str, data: str) -> bytes:
        """The bytes of the picture in base64 `data`, which stands in the field `name`."""
        options = self._options
        self._count += 1
        if self._count > options.most_images:
            raise fields.refusal(name, f"is one image too many; expected at most {options.most_images}")
        if len(data) * 3 // 4 > options.most_image_bytes:
            raise fields.refusal(name, f"holds an image of more than {options.most_image_bytes:,} bytes")
        try:
            decoded = base64.b64decode(data, validate=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                with Image.open(io.BytesIO(decoded)) as opened:
                    pixels = opened.width * opened.height
        except (binascii.Error, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise fields.refusal(name, f"holds no image that can be read ({type(error).__name__})") from None
        most = options.most_image_pixels
        if pixels > most:
            raise fields.refusal(name, f"holds an image of {pixels:,} pixels; expected at most {most:,}")
        return decoded
