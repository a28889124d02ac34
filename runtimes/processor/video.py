"""Videos as frames, each as a player shows it: turned, with square pixels, on white where it is transparent."""

from __future__ import annotations

import os
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from arriero.errors import ArrieroError, MachineLacks
from arriero.runtimes.broken_package import importing
from arriero.runtimes.processor.high_range import check_range
from arriero.runtimes.processor.pictures import check_pixels, on_white
from arriero.traits import install

if TYPE_CHECKING:
    import av

FRAMES = 8  # of a video, where nothing else is said
MOST_FRAMES = 1024  # that may be taken of a video
MOST_DECODED = 200_000  # frames of a video, about two hours: all of it is decoded to find the middles of its parts


def read_video(path: str | os.PathLike[str], num_frames: int, most: int = MOST_FRAMES) -> list[Image.Image]:
    """Give `num_frames` frames of a video, the middles of as many equal parts of it (fewer if it has fewer).

    Raises ArrieroError for more than `most`, and for a video that is too long or whose frames cannot be shown.
    """
    most = min(most, MOST_FRAMES)
    if not isinstance(num_frames, Integral) or isinstance(num_frames, bool) or num_frames < 1:
        raise ArrieroError(f"num_frames is {num_frames!r}", where=str(path), expected="a whole number of at least 1")
    if num_frames > most:
        raise ArrieroError(
            f"num_frames is {num_frames:,}", where=str(path), expected=f"at most {most:,}", remedy="Take fewer frames"
        )
    remedy = f"Install it with `{install('video')}`, or pass the frames as images"
    absent = MachineLacks("reading a video file needs the package av", where=str(path), remedy=remedy)
    with importing("av", absent=absent):
        import av
    if not (isinstance(path, str | os.PathLike) and Path(path).is_file()):
        raise ArrieroError("there is no such video file", where=str(path), remedy="Check the path")
    try:
        # two passes, since many containers do not state their frame count and all frames at once may not fit memory
        total = _count(path)
        numbers = {(2 * i + 1) * total // (2 * num_frames) for i in range(num_frames)}
        with av.open(str(path)) as video:
            ratio = video.streams.video[0].sample_aspect_ratio
            frames = [_shown(f, ratio, str(path)) for i, f in enumerate(video.decode(video=0)) if i in numbers]
    except (av.FFmpegError, IndexError) as error:
        raise ArrieroError(
            f"the video cannot be decoded ({error})", where=str(path), remedy="Get a complete copy of the file"
        ) from None
    if not frames:
        raise ArrieroError("the video has no frames", where=str(path), remedy="Get a complete copy of the file")
    return frames


def _count(path: str | os.PathLike[str]) -> int:
    import av

    with av.open(str(path)) as video:
        stream = video.streams.video[0]
        check_pixels(max(stream.width, 1), max(stream.height, 1), str(path))
        total = stream.frames if stream.frames > MOST_DECODED else 0
        for _ in video.decode(video=0) if not total else ():
            total += 1
            if total > MOST_DECODED:
                break
    if total > MOST_DECODED:
        raise ArrieroError(
            f"the video has more than {MOST_DECODED:,} frames",
            where=str(path),
            expected=f"at most {MOST_DECODED:,}",
            remedy="Cut out the part that is meant, or pass frames as images",
        )
    return total


def _shown(frame: av.VideoFrame, ratio: Any, name: str) -> Image.Image:
    check_pixels(frame.width, frame.height, name)
    remedy = "Tone-map it first, for example with ffmpeg's zscale and tonemap filters"
    check_range(frame.color_trc, "video", name, remedy)
    if frame.format.has_palette or any(component.is_alpha for component in frame.format.components):
        image = on_white(Image.fromarray(frame.to_ndarray(format="rgba"), "RGBA"))
    else:
        image = frame.to_image()
    if ratio and ratio != 1:  # pixels that are wider than high, or the reverse
        width = max(round(image.width * float(ratio)), 1)
        check_pixels(width, image.height, name)
        image = image.resize((width, image.height), Image.Resampling.BILINEAR)
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image
