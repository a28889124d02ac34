"""Videos as frames, each read as an image."""

from __future__ import annotations

import os
from numbers import Integral
from pathlib import Path

from PIL import Image

from arriero.errors import ArrieroError, MachineLacks

FRAMES = 8  # of a video, where nothing else is said


def read_video(path: str | os.PathLike[str], num_frames: int) -> list[Image.Image]:
    """Give `num_frames` frames of a video, the middles of as many equal parts of it (fewer if it has fewer)."""
    if not (isinstance(num_frames, Integral) and num_frames >= 1):
        raise ArrieroError(f"num_frames is {num_frames!r}", where=str(path), expected="a whole number of at least 1")
    try:
        import av
    except ImportError:
        raise MachineLacks(
            "reading a video file needs the package av",
            where=str(path),
            remedy="Install it with `pip install 'arriero[video]'`, or pass the frames as images",
        ) from None
    if not (isinstance(path, str | os.PathLike) and Path(path).is_file()):
        raise ArrieroError("there is no such video file", where=str(path), remedy="Check the path")
    try:
        # two passes, since many containers do not state their frame count and all frames at once may not fit memory
        with av.open(str(path)) as video:
            total = sum(1 for _ in video.decode(video=0))
        numbers = {(2 * i + 1) * total // (2 * num_frames) for i in range(num_frames)}
        with av.open(str(path)) as video:
            frames = [frame.to_image() for i, frame in enumerate(video.decode(video=0)) if i in numbers]
    except (av.FFmpegError, IndexError) as error:
        raise ArrieroError(
            f"the video cannot be decoded ({error})", where=str(path), remedy="Get a complete copy of the file"
        ) from None
    if not frames:
        raise ArrieroError("the video has no frames", where=str(path), remedy="Get a complete copy of the file")
    return frames
