"""Video sources. Owns how a source is named on a command line; each kind lives in its own module."""

from __future__ import annotations

import difflib
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qsl

from edge.clock import Clock
from edge.errors import SourceError, UsageError
from edge.masking import mask_secrets
from edge.sources.address import SourceUrl
from edge.sources.base import Ending, Source, SourceInfo

__all__ = ["Ending", "Source", "SourceInfo", "SourceUrl", "SyntheticFactory", "mask_secrets", "open_source"]

SyntheticFactory = Callable[[str, dict[str, str]], Source]
"""Makes the source of `synthetic:<scene>?<options>` from the scene's name and its options."""

_URL_SCHEMES = ("rtsp", "rtsps", "http", "https")
_PREFIXES = ("synthetic", "gst", "csi", "v4l2")
_KINDS = (
    "a video file, a folder of pictures, rtsp://..., http://... (MJPEG), /dev/video0, v4l2:0, csi:0,"
    " gst:<pipeline> or synthetic:<scene>"
)


def open_source(
    text: str, *, clock: Clock, synthetic: SyntheticFactory | None = None, images_fps: float = 1.0
) -> Source:
    """The source that `text` names, not opened yet.

    Args:
      text: see `docs`: a path, an address or a `kind:` with its argument.
      clock: gives live sources their media times.
      synthetic: makes generated scenes; without it `synthetic:` is refused.
      images_fps: pictures per second of a folder of pictures.

    Raises:
      UsageError: no kind of source is spelt like this.
      SourceError: the file or device does not exist, or the kind is not available on this machine.
    """
    text = text.strip()
    if not text:
        raise UsageError("The source is empty", hint=f"Give {_KINDS}")
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", text)
    if scheme:
        return _from_url(scheme.group(1), SourceUrl(text), clock)
    prefix, colon, argument = text.partition(":")
    if colon and prefix in _PREFIXES:
        return _from_prefix(prefix, argument, clock, synthetic)
    mode = _mode(text)
    if stat.S_ISCHR(mode) or (mode == 0 and text.startswith("/dev/video")):
        return _from_device(text, clock)
    return _from_path(text, images_fps)


def _from_url(scheme: str, url: SourceUrl, clock: Clock) -> Source:
    if scheme.lower() not in _URL_SCHEMES:
        raise UsageError(
            f"Source `{url}` has the unknown scheme `{scheme}://`", hint=_nearest(scheme, _URL_SCHEMES, "://")
        )
    from edge.sources.camera import url_camera

    return url_camera(url, clock=clock)


def _from_prefix(prefix: str, argument: str, clock: Clock, synthetic: SyntheticFactory | None) -> Source:
    if prefix == "synthetic":
        return _from_scene(argument, synthetic)
    if prefix == "v4l2":
        return _from_device(f"/dev/video{_index(prefix, argument)}", clock)
    from edge.sources.camera import csi_camera, pipeline_camera

    if prefix == "csi":
        return csi_camera(_index(prefix, argument), clock=clock)
    if not argument.strip():
        raise UsageError("Source `gst:` lacks its pipeline", hint="For example `gst:videotestsrc is-live=true`")
    return pipeline_camera(f"gst:{mask_secrets(argument)}", SourceUrl(argument), clock=clock)


def _from_scene(argument: str, synthetic: SyntheticFactory | None) -> Source:
    if synthetic is None:
        raise UsageError("Source `synthetic:` is not available here", hint="Use `streamo-edge run`, or another source")
    scene, _, query = argument.partition("?")
    try:
        options = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=True)) if query else {}
    except ValueError as error:
        raise UsageError(
            f"Source `synthetic:{argument}` has options that are not `name=value` pairs: `{query}`",
            hint="For example `synthetic:table?seed=7&seconds=60`, in quotes",
        ) from error
    return synthetic(scene, options)


def _from_device(path: str, clock: Clock) -> Source:
    if not os.path.exists(path):
        present = sorted((p.name for p in Path("/dev").glob("video*")), key=lambda name: (len(name), name))
        found = ", ".join(f"/dev/{name}" for name in present) or "no camera under /dev/video*"
        raise SourceError(f"Camera `{path}` does not exist; found {found}", hint="Plug it in, or give another source")
    if not os.access(path, os.R_OK | os.W_OK):
        hint = "Join its group: `sudo usermod -aG video $USER`"
        raise SourceError(f"Camera `{path}` may not be used by this user", hint=hint)
    from edge.sources.camera import device_camera

    number = re.fullmatch(r"/dev/video(\d+)", path)
    return device_camera(path, int(number.group(1)) if number else path, clock=clock)


def _from_path(text: str, images_fps: float) -> Source:
    path = Path(text).expanduser()
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError) as error:  # longer than any name, or with a NUL in it
        message = f"Source `{mask_secrets(text[:60])}` is no path: {error.args[-1]}"
        raise UsageError(message, hint=f"Give {_KINDS}") from error
    if is_folder:
        from edge.sources.images import ImageFolderSource

        return ImageFolderSource(path, fps=images_fps)
    if exists and not path.is_file():
        message = f"Source `{mask_secrets(text)}` is neither a file nor a camera, but a pipe or another special file"
        raise UsageError(message, hint=f"Give {_KINDS}")
    if exists:
        from edge.sources.file import VideoFileSource

        return VideoFileSource(path)
    prefix, colon, _ = text.partition(":")
    if colon and re.fullmatch(r"[A-Za-z0-9]+", prefix):
        message = f"Source `{mask_secrets(text)}` is of the unknown kind `{prefix}:`"
        raise UsageError(message, hint=_nearest(prefix, _PREFIXES, ":"))
    if text.isdecimal():
        hint = f"Use `--source /dev/video{text}`"
        raise UsageError(f"Source `{text}` is no file; a camera is named by its device", hint=hint)
    siblings = os.listdir(path.parent) if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=1)
    hint = f"Did you mean `{path.parent / near[0]}`?" if near else f"Give {_KINDS}"
    raise SourceError(f"Video `{mask_secrets(text)}` does not exist", hint=hint)


def _mode(text: str) -> int:
    """What kind of file `text` names, as in `stat`; 0 where there is none."""
    try:
        return os.stat(Path(text).expanduser()).st_mode
    except (OSError, ValueError):
        return 0


def _index(prefix: str, argument: str) -> int:
    if not argument.isdecimal():
        message = f"Source `{prefix}:{argument}` should end in a camera's number"
        raise UsageError(message, hint=f"For example `{prefix}:0`")
    return int(argument)


def _nearest(word: str, known: tuple[str, ...], ending: str) -> str:
    near = difflib.get_close_matches(word.lower(), known, n=1)
    return f"Did you mean `{near[0]}{ending}`?" if near else f"Give {_KINDS}"
