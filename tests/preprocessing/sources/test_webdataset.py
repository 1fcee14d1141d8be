"""WebDataset. Tar files are written as by ``video2dataset``; real videos are added unchanged."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from helpers.formats import REAL, jpeg, moving, numbered, quadrants, write_video
from helpers.readers import refs_of, said
from test_films import UNEVEN
from test_films import write as irregular

from preprocessing.contracts.contract import DataContract
from preprocessing.episode import Episode, EpisodeRef
from preprocessing.errors import BadEpisode, UserError
from preprocessing.limits import Limits, use
from preprocessing.sources import digest, find, load, webdataset
from uwm_model.metrics import psnr


def shard(path: Path, members: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def encoded(folder: Path, frames: np.ndarray, name: str = "encoded.mp4", fps: int = 20) -> bytes:
    codec = "libvpx" if name.endswith("webm") else "libx264"
    return write_video(folder / name, frames, fps=fps, codec=codec).read_bytes()


def one(path: Path) -> Episode:
    [ref] = refs_of(path)
    assert ref.problem is None and digest(ref) == ref.digest
    return load(ref)


def problem_of(ref: EpisodeRef) -> str:
    """The problem, from ``scan`` or from ``load`` and its frames."""
    try:
        for video in load(ref).cameras.values():
            for _ in video.frames(None):
                pass
    except BadEpisode as error:
        return str(error)
    return "none"


def frames_of(episode: Episode, camera: str = "video", size: int | None = None) -> np.ndarray:
    return np.concatenate(list(episode.cameras[camera].frames(size)))


@pytest.mark.skipif(not REAL.exists(), reason=f"no real data at {REAL}")
def test_real_videos_equal_those_outside_a_shard(tmp_path):
    names = ["test_clip_10s.mp4", "flipping_a_pancake.mkv"]
    members = {}
    for number, name in enumerate(names):
        members[f"00000_{number}.json"] = json.dumps({"caption": f"clip {number}", "url": name}).encode()
        members[f"00000_{number}.{name[-3:]}"] = (REAL / "video" / name).read_bytes()
        members[f"00000_{number}.txt"] = f"what clip {number} shows\n".encode()
    packed = [load(ref) for ref in refs_of(shard(tmp_path / "00000.tar", members))]
    alone = [load(ref) for name in names for ref in refs_of(REAL / "video" / name)]
    for number, (episode, other) in enumerate(zip(packed, alone, strict=True)):
        assert (episode.fps, episode.action, episode.embodiment) == (other.fps, None, "video")
        assert episode.instruction == f"what clip {number} shows"
        assert episode.texts == {"txt": f"what clip {number} shows", "caption": f"clip {number}"}
        assert np.array_equal(frames_of(episode, size=64), frames_of(other, size=64))


def test_videos_in_several_shards_and_formats(tmp_path):
    top = tmp_path / "a, b:c"  # might confuse FFmpeg's subfile protocol
    first = {"x/a.mp4": encoded(tmp_path, numbered(40)), "x/b.webm": encoded(tmp_path, numbered(30), "b.webm")}
    shard(top / "0.tar", first, tarfile.USTAR_FORMAT)
    shard(top / "1.tar", {f"{'long' * 50}.MP4": encoded(tmp_path, quadrants()[None].repeat(5, 0))}, tarfile.GNU_FORMAT)
    a, b, long = (load(ref) for ref in refs_of(top))
    for episode, count in ((a, 40), (b, 30)):
        assert np.allclose(frames_of(episode).mean(axis=(1, 2, 3)), 20 + 2 * np.arange(count), atol=1.5)
    assert psnr(frames_of(long)[0], quadrants()) > 25 and frames_of(long).shape[0] == 5
    half = load(a.ref, fps=10)
    assert half.fps == 10 and np.allclose(frames_of(half).mean(axis=(1, 2, 3)), 20 + 4 * np.arange(20), atol=1.5)


def test_several_videos_are_cameras(tmp_path):
    videos = {"k.top.mp4": encoded(tmp_path, numbered(9)), "k.wrist.mp4": encoded(tmp_path, moving(9))}
    episode = one(shard(tmp_path / "a.tar", videos))
    assert list(episode.cameras) == ["top", "wrist"]
    assert psnr(frames_of(episode, "wrist"), moving(9)).min() > 25
    slow = videos | {"k.wrist.mp4": encoded(tmp_path, moving(9), fps=10)}
    [ref] = refs_of(shard(tmp_path / "b.tar", slow))
    assert problem_of(ref) == "sample k holds videos of 2 different rates"


@pytest.mark.parametrize("inside", [True, False])
def test_numbered_images_are_a_clip(tmp_path, inside):
    """As members of one sample or as samples of one folder, sorted by number, not by name."""
    source = moving(12)
    order = sorted(range(12), key=str)
    names = {i: f"clips/7.frame_{i}.jpg" if inside else f"clips/7/{i}.jpg" for i in order}
    members = {name: jpeg(source[i]) for i, name in names.items()}
    members |= {"clips/7.json" if inside else "clips/7/0.json": json.dumps({"fps": 5, "text": "a square"}).encode()}
    if not inside:  # the caption is next to the first image
        members = dict(sorted(members.items()))
    members["clips/8.mp4"] = encoded(tmp_path, numbered(5))
    clip, other = refs_of(shard(tmp_path / "a.tar", members))
    episode = load(clip)
    quality = psnr(frames_of(episode)[:, None], source[None])  # each frame against each original
    assert quality.argmax(axis=1).tolist() == list(range(12)) and np.diag(quality).min() > 28
    assert (episode.fps, episode.instruction, said(episode)) == (5, "a square", [])
    assert len(frames_of(load(other))) == 5


def test_images_without_a_rate(tmp_path):
    members = {f"a.{i}.png": png(image) for i, image in enumerate(moving(3))}
    episode = one(shard(tmp_path / "a.tar", members))
    assert said(episode) == ["the rate of the images is not recorded; 10 Hz assumed"] and episode.fps == 10
    assert np.array_equal(frames_of(episode), moving(3))


def test_a_contract_settles_the_rate(tmp_path):
    members = {f"a.{i}.png": png(image) for i, image in enumerate(moving(3))}
    [ref] = refs_of(shard(tmp_path / "a.tar", members))
    episode = load(ref, DataContract(fps=25))
    assert episode.fps == 25 and said(episode) == []


@pytest.mark.parametrize("rate", [0, -5, 1e9, "30"])
def test_invalid_rates_are_ignored(tmp_path, rate):
    members = {f"a.{i}.png": png(image) for i, image in enumerate(moving(3))}
    members["a.json"] = json.dumps({"fps": rate}).encode()
    assert one(shard(tmp_path / "a.tar", members)).fps == 10


def test_repairs_of_a_video_name_its_camera(tmp_path):
    path = irregular(tmp_path / "a.mkv", times=UNEVEN)
    episode = one(shard(tmp_path / "a.tar", {"k.top.mkv": path.read_bytes()}))
    assert [repair.split(";")[0] for repair in said(episode)] == ["top: frames come at irregular times"]


def test_limits_and_links(tmp_path, monkeypatch):
    images = {f"a.{i}.png": png(image) for i, image in enumerate(moving(3))}
    [ref] = refs_of(shard(tmp_path / "a.tar", images))
    use(Limits(array_bytes=100))
    try:
        assert "0.png has" in problem_of(ref) and "more than limits.array_bytes" in problem_of(ref)
    finally:
        use(Limits())
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        link = tarfile.TarInfo("b.mp4")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert [problem_of(ref) for ref in refs_of(tmp_path / "a.tar")] == ["none"]
    monkeypatch.setattr(webdataset, "MAX_MEMBERS", 2)
    assert "more than 2 members" in str(refs_of(tmp_path / "a.tar")[-1].problem)


def png(image: np.ndarray) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    "members, texts, repairs",
    [
        ({"json": b'{"caption": null, "prompt": " go ", "fps": 3}'}, {"prompt": "go"}, ()),
        ({"json": b'{"captions": ["one", "two", 3]}'}, {"captions": "one", "captions_1": "two"}, ()),
        ({"json": b'{"caption": "j"}', "en.txt": b"t\n"}, {"en.txt": "t", "caption": "j"}, ()),
        ({"txt": b" \n"}, {}, ()),
        ({"json": b'\xef\xbb\xbf{"caption": "j"}', "txt": b"\xef\xbb\xbft"}, {"txt": "t", "caption": "j"}, ()),
        ({"txt": b"\xff"}, {}, ("txt cannot be read",)),
        ({"json": b"[" * 100_000}, {}, ("json cannot be read",)),
        ({"json": b"7"}, {}, ("json cannot be read (not a JSON object); left out",)),
        ({"txt": b"x" * (2**20 + 1)}, {}, ("txt cannot be read (1048577 bytes); left out",)),
    ],
)
def test_captions(tmp_path, members, texts, repairs):
    data = encoded(tmp_path, numbered(3))
    episode = one(shard(tmp_path / "a.tar", {f"k.{name}": word for name, word in members.items()} | {"k.mp4": data}))
    assert episode.texts == texts and episode.instruction == next(iter(texts.values()), None)
    assert len(said(episode)) == len(repairs)
    assert all(found.startswith(text) for found, text in zip(said(episode), repairs, strict=True))


def joined(folder: Path, *parts: dict[str, bytes]) -> Path:
    """Join the members of several tar files in one; names may repeat."""
    with tarfile.open(folder / "joined.tar", "w") as tar:
        for name, data in (member for part in parts for member in part.items()):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return folder / "joined.tar"


def test_repeated_names_are_separate_samples(tmp_path):
    videos = [encoded(tmp_path, numbered(count)) for count in (5, 6)]
    parts = [{"k.mp4": data, "k.txt": text} for data, text in zip(videos, (b"one", b"two"), strict=True)]
    for between in ([], [{"l.mp4": videos[0]}]):
        found = [load(ref) for ref in refs_of(joined(tmp_path, parts[0], *between, parts[1]))]
        found = [episode for episode in found if episode.instruction]
        assert [episode.instruction for episode in found] == ["one", "two"]
        assert [len(frames_of(episode)) for episode in found] == [5, 6]


def test_a_scattered_sample_is_refused(tmp_path):
    data = encoded(tmp_path, numbered(5))
    refs = refs_of(shard(tmp_path / "a.tar", {"k.mp4": data, "l.mp4": data, "k.txt": b"go", "m.mp4": data}))
    says = "members of sample k are not consecutive; sort the shard (`tar --sort=name`)"
    assert [problem_of(ref) for ref in refs] == [says, "none", says, "none"]


def test_a_shard_is_detected_by_its_members(tmp_path):
    members = {f"k.{i:02}.npy": b"x" for i in range(30)}
    assert (
        len(frames_of(one(shard(tmp_path / "a.tar", members | {"k.top.mp4": encoded(tmp_path, numbered(5))})), "top"))
        == 5
    )


def test_a_sample_keeps_its_id_in_another_shard(tmp_path):
    one_video, other = encoded(tmp_path, numbered(5)), encoded(tmp_path, numbered(6))
    [ref, _] = refs_of(shard(tmp_path / "a.tar", {"k.mp4": one_video, "k.txt": b"go", "l.mp4": other}))
    moved = refs_of(shard(tmp_path / "b.tar", {"l.mp4": other, "m.npy": b"x", "n/k.mp4": one_video, "n/k.txt": b"go"}))
    assert moved[1].id == ref.id and moved[1].index == 1 and len(moved) == 2
    [changed] = refs_of(shard(tmp_path / "c.tar", {"k.mp4": one_video, "k.txt": b"stop"}))
    assert changed.id != ref.id
    shard(tmp_path / "a.tar", {"k.mp4": other, "k.txt": b"go", "l.mp4": other})
    assert digest(ref) != ref.digest
    shard(tmp_path / "a.tar", {"x.json": b"{}"})
    with pytest.raises(BadEpisode, match="neither a video nor numbered images"):
        load(ref)


@pytest.mark.parametrize(
    "members, says",
    [
        ({"a.jpg": jpeg(quadrants())}, "holds a single image, not a clip"),
        ({"a.x.jpg": jpeg(quadrants()), "a.2.jpg": jpeg(quadrants())}, "without a number or with a repeated one"),
        ({"a.02.jpg": jpeg(quadrants()), "a.2.jpg": jpeg(quadrants())}, "without a number or with a repeated one"),
        ({f"a.{i}.jpg": jpeg(quadrants()) for i in (1, 2, 4)}, "image 3 is missing between others"),
        ({"a.1.jpg": jpeg(quadrants()), "a.2.jpg": b"x"}, "an image of 1 bytes is neither JPEG nor PNG"),
        ({"a.mp4": b"x" * 99}, "cannot be opened as video"),
        ({"a.txt": b"x", "b.mp4.txt": b"x", "c.mp4": b""}, "sample a holds neither a video nor numbered images"),
    ],
)
def test_samples_that_are_not_clips_are_refused(tmp_path, members, says):
    ref = refs_of(shard(tmp_path / "a.tar", members))[0]
    assert says in problem_of(ref)


def test_images_with_a_caption_each_are_not_a_clip(tmp_path):
    members = {
        f"a/{i}.{kind}": jpeg(quadrants()) if kind == "jpg" else b"x" for i in range(3) for kind in ("jpg", "txt")
    }
    refs = refs_of(shard(tmp_path / "a.tar", members))
    assert [problem_of(ref) for ref in refs] == ["holds a single image, not a clip"] * 3


def test_a_truncated_shard_keeps_complete_episodes(tmp_path):
    videos = {f"{i}.mp4": encoded(tmp_path, numbered(10 + i)) for i in range(4)}
    whole = refs_of(shard(tmp_path / "a.tar", videos))
    data = (tmp_path / "a.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        starts = [member.offset for member in tar]

    (tmp_path / "a.tar").write_bytes(data[: starts[3] + 600])
    *kept, lost = refs_of(tmp_path / "a.tar")
    assert [ref.id for ref in kept] == [ref.id for ref in whole[:3]][: len(kept)] and len(kept) >= 2
    assert str(lost.problem).startswith(f"the shard breaks after {len(kept)} samples: ")

    (tmp_path / "a.tar").write_bytes(data[: starts[2]] + b"x" * 512 + data[starts[2] + 512 :])
    kept_id, lost = refs_of(tmp_path / "a.tar")
    assert kept_id.id == whole[0].id and "no valid header at byte" in str(lost.problem)

    (tmp_path / "a.tar").write_bytes(b"x" * 512 + data[512:])
    [lost] = refs_of(tmp_path / "a.tar")
    assert str(lost.problem).startswith("the shard breaks after 0 samples: ")


def test_other_tar_files_are_ignored(tmp_path):
    shard(tmp_path / "code.tar", {"main.py": b"", "a/b.txt": b""})
    write_video(tmp_path / "a.mp4", numbered(3))
    assert [format for format, _ in find(tmp_path)] == ["video"]
    with pytest.raises(UserError, match=r"holds nothing of format webdataset; expected \*.tar of clips"):
        find(tmp_path / "code.tar", "webdataset")


def header(**fields: object) -> bytes:
    info = tarfile.TarInfo("a.mp4")
    for name, value in fields.items():
        setattr(info, name, value)
    return info.tobuf(tarfile.GNU_FORMAT)


SPARSE = b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n"


@pytest.mark.parametrize(
    "data",
    [
        header(size=-1024),
        header(size=2**60),
        header(type=tarfile.XHDTYPE, size=2**40),
        header(type=tarfile.XHDTYPE, size=-512),
        header(type=tarfile.GNUTYPE_LONGNAME, size=2**40),
        header(type=tarfile.GNUTYPE_SPARSE, size=2**40),
        header(type=tarfile.GNUTYPE_LONGNAME, size=0) * 3000,
        header(type=tarfile.XHDTYPE, size=len(SPARSE)) + SPARSE.ljust(512, b"\0") + header(size=512),
    ],
)
def test_lying_headers_end_only_their_shard(tmp_path, data):
    (tmp_path / "a.tar").write_bytes(data)
    for ref in refs_of(tmp_path / "a.tar"):
        assert problem_of(ref) != "none"


def test_shard_headers_are_read_once(tmp_path, monkeypatch):
    listed = []
    real = webdataset._listed
    monkeypatch.setattr(webdataset, "_listed", lambda file: listed.append(file) or real(file))
    refs = refs_of(shard(tmp_path / "a.tar", {f"{i}.mp4": encoded(tmp_path, numbered(3)) for i in range(5)}))
    for ref in refs:
        load(ref)
        digest(ref)
    assert len(refs) == 5 and len(listed) == 2  # once by the scan
