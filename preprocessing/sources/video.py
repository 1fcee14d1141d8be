"""Video files: each is one episode without actions, for the video half of the model.

A file is recognised by its suffix, or else by its first bytes: ``ftyp`` (ISO/IEC 14496-12, 4.3), EBML (RFC 8794, 8),
RIFF AVI or MPEG-TS (ISO/IEC 13818-1, 2.4.3.2). The digest covers the file's bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from preprocessing.episode import Episode, EpisodeRef, Repair
from preprocessing.errors import BadEpisode
from preprocessing.sources.scan_cache import Finding, file_digest, findings
from preprocessing.sources.untrusted.files import FILMS, files_in, magic
from preprocessing.video.decode import open_video_file, probe_video

# Bytes of an MPEG-TS packet, which begins with 0x47 (ISO/IEC 13818-1, 2.4.3.2). The suffix .ts is TypeScript's, too.
TS_PACKET = 188
NOT_VIDEO_BRANDS = (b"M4A", b"M4B", b"hei", b"mif", b"avi")  # audio and still images in the same container


def detect(path: Path) -> bool:
    return any(True for _ in _files(path))


def scan(path: Path) -> Iterator[EpisodeRef]:
    for file, [finding] in findings("video", _files(path), _read):
        yield EpisodeRef(str(file.absolute()), "video", 0, finding.digest, finding.problem)


def digest(ref: EpisodeRef) -> str:
    return file_digest(Path(ref.uri))


def load(ref: EpisodeRef) -> Episode:
    info = probe_video(ref.uri)
    video, fps, repairs = open_video_file(ref.uri)
    if info.streams > 1:
        repairs.append(
            Repair("streams", f"{info.streams} video streams; the one of {info.width}x{info.height} is read")
        )
    return Episode(
        ref=ref,
        fps=fps,
        cameras={"video": video},
        proprio={},
        action=None,
        action_layout=(),
        instruction=None,
        success=None,
        embodiment="video",
        repairs=tuple(repairs),
    )


def _read(file: Path) -> list[Finding]:
    problem = None
    try:
        probe_video(file)
    except BadEpisode as error:
        problem = str(error)
    return [Finding(file_digest(file), problem)]


def _files(path: Path) -> Iterator[Path]:
    return filter(_is_video, files_in(path))


def _is_video(path: Path) -> bool:
    if path.suffix.lower() in FILMS:
        return True
    head = magic(path)
    if head[: 2 * TS_PACKET + 1 : TS_PACKET] == b"GGG":
        return True
    if head[4:8] == b"ftyp":
        return not head[8:12].startswith(NOT_VIDEO_BRANDS)
    return head[:4] == b"\x1a\x45\xdf\xa3" or (head[:4] == b"RIFF" and head[8:12] == b"AVI ")
