"""CALVIN: one file per step, and instructions in a pickle."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
from helpers.formats import numbered, write_calvin
from helpers.readers import episodes_of, frames_of, refs_of

from preprocessing.errors import BadEpisode
from preprocessing.sources import digest, load


def test_calvin(tmp_path):
    pictures = numbered(100, 32)
    pictures[:, :8, :8] = 220, 30, 30
    folder = write_calvin(tmp_path / "D" / "training", pictures)
    (whole,) = episodes_of(tmp_path)
    assert np.array_equal(frames_of(whole, "static"), pictures)
    assert np.array_equal(frames_of(whole, "gripper"), pictures[:, ::2, ::2])
    rows = [np.load(file) for file in sorted(folder.glob("episode_*.npz"))]
    assert np.array_equal(whole.action, np.stack([row["rel_actions"] for row in rows]).astype(np.float32))
    assert np.array_equal(whole.proprio["robot_obs"], np.stack([row["robot_obs"] for row in rows]).astype(np.float32))
    assert (whole.fps, whole.embodiment, whole.instruction) == (30, "panda", None)
    position, rotation, gripper = whole.action_layout
    for block in (position, rotation):
        assert (block.size, block.mode, block.frame, block.unit) == (3, "delta", "base", "scaled")
    assert rotation.representation == "euler_xyz"
    assert (gripper.size, gripper.mode, gripper.gripper_one_means) == (1, "absolute", "open")
    assert np.array_equal(whole.signals["actions"], np.stack([row["actions"] for row in rows]).astype(np.float32))
    assert np.array_equal(whole.signals["scene_obs"], np.stack([row["scene_obs"] for row in rows]).astype(np.float32))
    assert (whole.split, whole.texts) == ("training", {})
    assert digest(whole.ref) == whole.ref.digest


def test_annotated_stretches_are_episodes(tmp_path):
    instructions = {(5, 40): "push the blöck", (30, 94): "open the drawer"}
    episodes = episodes_of(write_calvin(tmp_path / "x", numbered(100, 16), first=0, sentences=instructions))
    assert [(episode.instruction, len(episode.action)) for episode in episodes] == [
        ("push the blöck", 36),
        ("open the drawer", 65),
    ]
    assert [(e.texts, e.split) for e in episodes] == [({"language/ann": text}, None) for text in instructions.values()]
    assert np.array_equal(frames_of(episodes[1], "static"), numbered(100, 16)[30:95])
    again = write_calvin(tmp_path / "y", numbered(100, 16), first=0, sentences={**instructions, (5, 40): "pull"})
    first, second = refs_of(again)
    assert first.digest != episodes[0].ref.digest and second.digest == episodes[1].ref.digest


def test_missing_steps_and_bombs(tmp_path):
    folder = write_calvin(tmp_path / "x", numbered(9, 16), first=0, sentences={(0, 3): "a", (4, 6): "b", (7, 8): "c"})
    (folder / "episode_0000002.npz").unlink()
    np.savez_compressed(folder / "episode_0000005.npz", rel_actions=np.zeros(2**24), robot_obs=np.zeros(15))
    lost, bomb, whole = refs_of(folder)
    assert "episode_0000002" in lost.problem and load(whole).instruction == "c"
    with pytest.raises(BadEpisode, match=r"rel_actions in episode_0000005.npz decompresses to 134217"):
        load(bomb)
    (folder / "episode_0000007.npz").write_bytes(b"PK\3\4 and no more")
    with pytest.raises(BadEpisode, match=r"episode_0000007.npz cannot be read"):
        load(whole)


def test_instructions_in_another_lang_folder(tmp_path):
    folder = write_calvin(tmp_path / "x", numbered(9, 16), first=0, sentences={(0, 3): "push", (2, 8): "pull"})
    (folder / "lang_annotations").rename(folder / "lang_paraphrase-MiniLM-L3-v2")
    assert [(e.instruction, len(e.action)) for e in episodes_of(folder)] == [("push", 4), ("pull", 7)]
    (folder / "lang_paraphrase-MiniLM-L3-v2" / "auto_lang_ann.npy").rename(folder / "auto_lang_ann.npy")
    assert [e.instruction for e in episodes_of(folder)] == ["push", "pull"]
    for name, text in (("lang_a", "other words"), ("lang_annotations", "the first of all")):
        (folder / name).mkdir()
        table = {"language": {"ann": [text]}, "info": {"indx": [(0, 3)]}}
        np.save(folder / name / "auto_lang_ann.npy", table)  # type: ignore[arg-type]
        assert [e.instruction for e in episodes_of(folder)] == [text]


def test_a_list_of_more_steps_than_exist(tmp_path):
    folder = write_calvin(tmp_path / "x", numbered(9, 16), first=3)
    ranges = [[3, 9_999_999], [3, 7], [0, 4], [12, 2**62], [8, 11]]
    np.save(folder / "ep_start_end_ids.npy", np.array(ranges[:3] + ranges[4:]))
    tracemalloc.start()
    problems = [ref.problem for ref in refs_of(folder)]
    assert tracemalloc.get_traced_memory()[1] < 2**23
    tracemalloc.stop()
    lost = "episode_{:07d}.npz is missing, of steps {} to {}".format
    assert problems == [lost(12, 3, 9_999_999), None, lost(0, 0, 4), None]
    np.save(folder / "ep_start_end_ids.npy", np.array(ranges))
    assert "not a list of episodes (steps 12 to 4611686018427387904)" in refs_of(folder)[0].problem


def test_an_array_that_decompresses_to_more_than_declared(tmp_path):
    folder = write_calvin(tmp_path / "x", numbered(3, 16), first=0)
    step = folder / "episode_0000001.npz"
    bomb = io.BytesIO()
    np.save(bomb, np.zeros(2**22))
    for method, says in (
        (zipfile.ZIP_DEFLATED, "cannot be read: "),
        (zipfile.ZIP_BZIP2, "not compressed with deflate"),
    ):
        with zipfile.ZipFile(step, "w", method) as file:
            file.writestr("robot_obs.npy", bomb.getvalue())
            file.writestr("rel_actions.npy", bomb.getvalue())
        lie = step.read_bytes().replace(struct.pack("<I", len(bomb.getvalue())), struct.pack("<I", 188))
        step.write_bytes(lie)
        [ref] = refs_of(folder)
        tracemalloc.start()
        with pytest.raises(BadEpisode, match=says):
            load(ref)
        assert tracemalloc.get_traced_memory()[1] < 2**23
        tracemalloc.stop()


def test_an_encrypted_image(tmp_path):
    folder = write_calvin(tmp_path / "x", numbered(3, 16), first=0)
    data = bytearray((folder / "episode_0000001.npz").read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1  # the first member in the central directory
    (folder / "episode_0000001.npz").write_bytes(data)
    [episode] = episodes_of(folder)
    with pytest.raises(BadEpisode, match=r"episode_0000001.npz cannot be read: .*encrypted"):
        frames_of(episode, "static")


def test_images_stored_in_other_ways(tmp_path):
    folder = write_calvin(tmp_path / "x", numbered(3, 16), first=0)
    for index, file in enumerate(sorted(folder.glob("episode_*.npz"))):
        arrays = dict(np.load(file))
        arrays["rgb_static"] = (numbered(3, 16)[index] / 255).transpose(2, 0, 1)
        arrays["rgb_gripper"] = np.full((16, 16), 900, np.uint16)
        np.savez(file, **arrays)
    [episode] = episodes_of(folder)
    assert np.array_equal(frames_of(episode, "static"), numbered(3, 16)) and list(episode.cameras) == ["static"]
    told = [repair.text for repair in episode.repairs]
    assert told[0] == "rgb_static has its channels first; moved last" and "rgb_gripper is uint16" in told[2]


@pytest.mark.parametrize("text", [["push"], 7, b"push", {"a": "push"}])
def test_an_instruction_that_is_not_text(tmp_path, text):
    [broken] = refs_of(write_calvin(tmp_path / "x", numbered(3, 16), first=0, sentences={(0, 2): text}))
    assert f"an instruction that is a {type(text).__name__}" in broken.problem
