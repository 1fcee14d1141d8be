"""Shipped contracts on data sets in their real layout, the effect of every contract field, and rotations."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from helpers.formats import jpeg, numbered, quadrants, write_tfds
from helpers.readers import said
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from preprocessing.contracts.contract import SHIPPED, DataContract, shipped_for
from preprocessing.contracts.rotations import WIDTHS, convert_rotation, with_rotations
from preprocessing.episode import ActionBlock, Episode, EpisodeRef, Repair
from preprocessing.errors import BadEpisode, UserError
from preprocessing.inspect.check import measure
from preprocessing.inspect.infer import contract_yaml
from preprocessing.sources import find, load, scan
from preprocessing.video.frames import sliced_video

STEPS = 7
FLAGS = {f"steps/{name}": "bool" for name in ("is_first", "is_last", "is_terminal")}
SCORES = {"steps/reward": "float32", "steps/discount": "float32"}

# The fields of each data set, named as in its features.json.
BRIDGE = {
    **{f"episode_metadata/has_{name}": "bool" for name in ("image_0", "image_1", "language")},
    "episode_metadata/file_path": "text",
    "episode_metadata/episode_id": "int32",
    "steps/action": "float32 7",
    "steps/observation/image_0": "jpeg",
    "steps/observation/image_1": "jpeg",
    "steps/observation/state": "float32 7",
    "steps/language_instruction": "text",
    "steps/language_embedding": "float32 512",
    **FLAGS,
    **SCORES,
}
BRIDGE_OXE = {
    "steps/action/open_gripper": "bool",
    "steps/action/rotation_delta": "float32 3",
    "steps/action/terminate_episode": "float32",
    "steps/action/world_vector": "float32 3",
    "steps/observation/image": "jpeg",
    "steps/observation/natural_language_embedding": "float32 512",
    "steps/observation/natural_language_instruction": "string",
    "steps/observation/state": "float32 7",
    "steps/reward": "float32",
    **FLAGS,
}
DROID = {
    "episode_metadata/file_path": "text",
    "episode_metadata/recording_folderpath": "text",
    "steps/action": "float64 7",
    "steps/action_dict/cartesian_position": "float64 6",
    "steps/action_dict/cartesian_velocity": "float64 6",
    "steps/action_dict/gripper_position": "float64 1",
    "steps/action_dict/gripper_velocity": "float64 1",
    "steps/action_dict/joint_position": "float64 7",
    "steps/action_dict/joint_velocity": "float64 7",
    "steps/language_instruction": "text",
    "steps/language_instruction_2": "text",
    "steps/language_instruction_3": "text",
    "steps/observation/cartesian_position": "float64 6",
    "steps/observation/gripper_position": "float64 1",
    "steps/observation/joint_position": "float64 7",
    "steps/observation/exterior_image_1_left": "jpeg",
    "steps/observation/exterior_image_2_left": "jpeg",
    "steps/observation/wrist_image_left": "jpeg",
    **FLAGS,
    **SCORES,
}
FRACTAL = {
    **{f"aspects/{name}": "bool" for name in ("already_success", "feasible", "has_aspects", "success", "undesirable")},
    "attributes/env_name": "string",
    "attributes/task_family": "int64",
    "steps/action/base_displacement_vector": "float32 2",
    "steps/action/base_displacement_vertical_rotation": "float32 1",
    "steps/action/gripper_closedness_action": "float32 1",
    "steps/action/rotation_delta": "float32 3",
    "steps/action/terminate_episode": "int32 3",
    "steps/action/world_vector": "float32 3",
    "steps/observation/base_pose_tool_reached": "float32 7",
    "steps/observation/gripper_closed": "float32 1",
    "steps/observation/image": "jpeg",
    "steps/observation/natural_language_embedding": "float32 512",
    "steps/observation/natural_language_instruction": "string",
    "steps/observation/workspace_bounds": "float32 3 3",
    "steps/reward": "float32",
    **FLAGS,
}
LIBERO = {
    "episode_metadata/file_path": "text",
    "steps/action": "float32 7",
    "steps/language_instruction": "text",
    "steps/observation/image": "jpeg",
    "steps/observation/joint_state": "float32 7",
    "steps/observation/state": "float32 8",
    "steps/observation/wrist_image": "jpeg",
    **FLAGS,
    **SCORES,
}
KUKA = {
    **{name: kind for name, kind in FRACTAL.items() if name.startswith("steps/action")},
    "steps/observation/image": "jpeg",
    "steps/observation/natural_language_instruction": "string",
    "success": "bool",
}


def recorded(fields: dict[str, str], seed: int = 0, **values: object) -> dict:
    """An episode of random numbers; frame t of the k-th field, if that is a camera, is ``picture(k, t)``."""
    rng = np.random.default_rng(seed)
    episode: dict = {}
    for place, (name, kind) in enumerate(fields.items()):
        dtype, *width = kind.split()
        shape = [STEPS if name.startswith("steps/") else 1, *map(int, width)]
        if dtype == "jpeg":
            episode[name] = [jpeg(picture(place, step)) for step in range(STEPS)]
        elif dtype in ("text", "string"):
            episode[name] = [f"{name} says"] * shape[0]
        elif dtype.startswith("float"):
            episode[name] = rng.uniform(-1, 1, shape).astype(np.float32)
        else:
            episode[name] = rng.integers(2, size=shape)
    return episode | values


def picture(place: int, step: int) -> np.ndarray:
    """A frame of four colours, dimmer for each further camera, with a bar that grows with the step."""
    frame = quadrants(128) // 8 * (8 - place % 5)
    frame[:16, : 16 * (step + 1)] = 255  # whole blocks, which JPEG keeps well
    return frame


def one(path: Path, contract: DataContract | None = None) -> Episode:
    (episode,) = [load(ref, contract) for format, found in find(path) for ref in scan(format, found)]
    return episode


def check_cameras(episode: Episode, fields: dict[str, str]) -> None:
    """Every frame of every camera equals the source's at the same step: upright, right colours, right order."""
    places = {name.split("/")[-1]: k for k, (name, kind) in enumerate(fields.items()) if kind == "jpeg"}
    assert list(episode.cameras) == sorted(places)
    for camera, place in places.items():
        frames = np.concatenate(list(episode.cameras[camera].frames(None)))
        sources = np.stack([picture(place, step) for step in range(STEPS)])
        errors = ((frames.astype(float)[:, None] - sources) ** 2).mean(axis=(2, 3, 4))
        assert errors.argmin(axis=1).tolist() == list(range(STEPS))
        assert 10 * np.log10(255**2 / errors.diagonal().max()) > 30


def meant(layout: tuple[ActionBlock, ...]) -> list[tuple]:
    return [(b.name, b.size, b.kind, b.representation, b.mode, b.frame, b.gripper_one_means) for b in layout]


def guesses(episode: Episode) -> list[str]:
    words = ("unknown", "assumed", "stands for", "read without it")
    return [text for text in said(episode) if any(word in text for word in words)]


# --------------------------------------------------------------------------------------------------------- shipped


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_contract_is_valid_and_has_references(file):
    contract = DataContract.load(file.stem)
    assert contract.name == file.stem and contract.source and contract.embodiment and contract.fps
    assert DataContract.load(file) == contract
    blocks = contract.action_layout or ()
    assert sum(block.kind == "gripper" for block in blocks) == (1 if blocks else 0)


@pytest.mark.parametrize(
    "dataset, names",
    [
        ("bridge_dataset", ["bridge"]),
        ("bridge", ["bridge", "bridge_oxe"]),
        ("droid", ["droid"]),
        ("droid_100", ["droid"]),
        ("droid_101", ["droid"]),
        ("r2d2_faceblur", ["droid"]),
        ("droid_wipe", []),
        ("fractal20220817_data", ["fractal"]),
        ("libero_spatial_no_noops", ["libero_rlds"]),
        ("libero_10_no_noops", ["libero_rlds"]),
        ("libero_90", ["libero"]),
        ("language_table_sim", ["language_table"]),
        ("kuka", ["kuka"]),
        ("stanford_kuka_multimodal_dataset_converted_externally_to_rlds", []),
        ("toy", []),
        ("", []),
        (None, []),
    ],
)
def test_a_data_sets_own_name_finds_its_contracts(dataset, names):
    assert [contract.name for contract in shipped_for(dataset)] == names


def test_bridge(tmp_path):
    record = recorded(BRIDGE)
    episode = one(write_tfds(tmp_path, "bridge_dataset", BRIDGE, [record], split="val"))
    check_cameras(episode, BRIDGE)
    assert np.array_equal(episode.action, record["steps/action"])
    assert meant(episode.action_layout) == [
        ("position", 3, "position", None, "delta", "base", None),
        ("rotation", 3, "rotation", "euler_xyz", "delta", "base", None),
        ("gripper", 1, "gripper", None, "absolute", "unknown", "open"),
    ]
    assert (episode.fps, episode.embodiment, episode.split) == (5, "widowx", "validation")
    assert (episode.instruction, episode.dataset) == ("steps/language_instruction says", "bridge_dataset")
    assert guesses(episode) == []


@pytest.mark.parametrize("name", ["bridge", "bridge_oxe"])
def test_bridge_of_open_x_embodiment(tmp_path, name):
    record = recorded(BRIDGE_OXE)
    episode = one(write_tfds(tmp_path, name, BRIDGE_OXE, [record], split="test"))
    check_cameras(episode, BRIDGE_OXE)
    parts = [record[f"steps/action/{part}"] for part in ("world_vector", "rotation_delta")]
    gripper = record["steps/action/open_gripper"][:, None]
    assert np.array_equal(episode.action, np.concatenate([*parts, gripper], axis=1).astype(np.float32))
    assert [(b.name, b.gripper_one_means) for b in episode.action_layout][-1] == ("gripper", "open")
    assert np.array_equal(
        episode.signals["action/terminate_episode"], record["steps/action/terminate_episode"][:, None]
    )
    assert (episode.fps, episode.embodiment, episode.split) == (5, "widowx", "validation")
    assert episode.instruction == "steps/observation/natural_language_instruction says"
    assert guesses(episode) == []


def test_bridge_of_open_x_embodiment_with_one_vector(tmp_path):
    episode = one(write_tfds(tmp_path, "bridge", BRIDGE, [recorded(BRIDGE)]))
    assert episode.action_layout == DataContract.load("bridge").action_layout
    assert guesses(episode) == []


def droid() -> dict:
    rng = np.random.default_rng(1)
    pose = np.concatenate([rng.uniform(-1, 1, (STEPS, 3)), rng.uniform(-np.pi, np.pi, (STEPS, 3))], axis=1)
    return recorded(
        DROID,
        **{
            "steps/action_dict/cartesian_position": pose,
            "steps/action_dict/gripper_position": np.linspace(0, 1, STEPS)[:, None],
            "steps/language_instruction_2": [""] * STEPS,
        },
    )


@pytest.mark.parametrize("name", ["droid", "droid_100"])
def test_droid(tmp_path, name):
    record = droid()
    episode = one(write_tfds(tmp_path, name, DROID, [record]))
    check_cameras(episode, DROID)
    pose = record["steps/action_dict/cartesian_position"].astype(np.float32)
    rows = Rotation.from_euler("xyz", pose[:, 3:]).as_matrix()[:, :2].reshape(STEPS, 6)
    expected = np.concatenate([pose[:, :3], rows, record["steps/action_dict/gripper_position"]], axis=1)
    assert episode.action.shape == (STEPS, 10) and episode.action.dtype == np.float32
    assert np.allclose(episode.action, expected, atol=1e-6)
    assert meant(episode.action_layout) == [
        ("position", 3, "position", None, "absolute", "base", None),
        ("rotation", 6, "rotation", "rotation_6d", "absolute", "base", None),
        ("gripper", 1, "gripper", None, "absolute", "unknown", "closed"),
    ]
    assert (episode.fps, episode.embodiment, episode.success) == (15, "panda", None)
    assert set(episode.proprio) == {"cartesian_position", "gripper_position", "joint_position"}
    velocity = record["steps/action_dict/joint_velocity"].astype(np.float32)
    assert np.array_equal(episode.signals["action_dict/joint_velocity"], velocity)
    assert np.array_equal(episode.signals["action"], record["steps/action"].astype(np.float32))
    assert "action_dict/cartesian_position" not in episode.signals
    assert episode.texts["language_instruction_3"] == "steps/language_instruction_3 says"
    assert episode.texts["recording_folderpath"] == "episode_metadata/recording_folderpath says"
    assert guesses(episode) == []


@pytest.mark.parametrize(
    ("folder", "success"),
    [("AUTOLab/success", True), ("AUTOLab/failure", False), ("AUTOLab", None), ("success/failure", None)],
)
def test_droid_success_comes_from_the_path_of_the_recording(tmp_path, folder, success):
    path = f"gs://bucket/r2d2/{folder}/2023-07-07/Fri_Jul__7_09:42:23_2023/trajectory.h5"
    record = droid() | {"episode_metadata/file_path": [path]}
    assert one(write_tfds(tmp_path / "droid", "droid_101", DROID, [record])).success is success
    fields = {name: kind for name, kind in DROID.items() if name != "episode_metadata/recording_folderpath"}
    record = {name: values for name, values in record.items() if name in fields}
    assert one(write_tfds(tmp_path / "another", "another", fields, [record])).success is None


@pytest.mark.parametrize(
    ("speeds", "layout"),
    [
        ("joint_velocity", [("joints", 7, "velocity"), ("gripper", 1, "absolute")]),
        ("cartesian_velocity", [("position", 3, "velocity"), ("rotation", 3, "velocity"), ("gripper", 1, "absolute")]),
    ],
)
def test_droid_with_velocities(tmp_path, speeds, layout):
    record = droid()
    episode = one(write_tfds(tmp_path, "droid", DROID, [record]), DataContract.load(f"droid_{speeds}"))
    expected = np.concatenate([record[f"steps/action_dict/{name}"] for name in (speeds, "gripper_position")], axis=1)
    assert np.array_equal(episode.action, expected.astype(np.float32))
    assert [(b.name, b.size, b.mode) for b in episode.action_layout] == layout
    assert guesses(episode) == []


def test_an_empty_text_is_no_instruction(tmp_path):
    write_tfds(tmp_path, "droid", DROID, [droid()])
    for number in (2, 3):
        episode = one(tmp_path, DataContract(instruction_field=f"language_instruction_{number}"))
        assert episode.instruction == f"steps/language_instruction{'_3' if number == 3 else ''} says"


def test_fractal(tmp_path):
    record = recorded(FRACTAL, **{"aspects/has_aspects": np.array([1]), "aspects/success": np.array([1])})
    episode = one(write_tfds(tmp_path, "fractal20220817_data", FRACTAL, [record]))
    check_cameras(episode, FRACTAL)
    names = ("world_vector", "rotation_delta", "gripper_closedness_action")
    assert np.array_equal(episode.action, np.concatenate([record[f"steps/action/{name}"] for name in names], axis=1))
    assert meant(episode.action_layout) == [
        ("position", 3, "position", None, "delta", "base", None),
        ("rotation", 3, "rotation", "euler_xyz", "delta", "base", None),
        ("gripper", 1, "gripper", None, "unknown", "unknown", "closed"),
    ]
    assert (episode.fps, episode.embodiment, episode.success) == (3, "google-robot", True)
    assert np.array_equal(
        episode.signals["action/base_displacement_vector"], record["steps/action/base_displacement_vector"]
    )
    assert episode.signals["action/terminate_episode"].shape == (STEPS, 3)
    assert episode.texts["attributes/env_name"] == "attributes/env_name says"
    assert episode.instruction == "steps/observation/natural_language_instruction says"
    assert guesses(episode) == []


def test_libero_of_openvla(tmp_path):
    record = recorded(LIBERO)
    episode = one(write_tfds(tmp_path, "libero_spatial_no_noops", LIBERO, [record]))
    check_cameras(episode, LIBERO)  # as recorded: its authors rotated them
    assert not any(video.turned for video in episode.cameras.values())
    assert np.array_equal(episode.action, record["steps/action"])
    assert meant(episode.action_layout) == [
        ("position", 3, "position", None, "delta", "base", None),
        ("rotation", 3, "rotation", "axis_angle", "delta", "base", None),
        ("gripper", 1, "gripper", None, "absolute", "unknown", "closed"),
    ]
    assert (episode.fps, episode.embodiment) == (20, "panda")
    assert guesses(episode) == []


def test_kuka(tmp_path):
    episode = one(write_tfds(tmp_path, "kuka", KUKA, [recorded(KUKA, success=np.array([0]))]))
    assert [block.name for block in episode.action_layout] == list(DataContract.load("kuka").action)
    assert (episode.fps, episode.embodiment, episode.success) == (10, "kuka-iiwa", False)
    assert guesses(episode) == []


LANGUAGE_TABLE = {
    "episode_id": "string",
    "steps/action": "float32 2",
    "steps/observation/effector_translation": "float32 2",
    "steps/observation/effector_target_translation": "float32 2",
    "steps/observation/instruction": "int32 512",
    "steps/observation/rgb": "jpeg",
    "steps/reward": "float32",
    **FLAGS,
}


def test_language_table_stores_instructions_as_numbers(tmp_path):
    sentence = np.zeros(512, int)
    words = "push the blöck up".encode()
    sentence[: len(words)] = list(words)
    record = recorded(LANGUAGE_TABLE, **{"steps/observation/instruction": np.stack([sentence] * STEPS)})
    episode = one(write_tfds(tmp_path, "language_table_sim", LANGUAGE_TABLE, [record]))
    check_cameras(episode, LANGUAGE_TABLE)
    assert episode.instruction == episode.texts["observation/instruction"] == "push the blöck up"
    assert (episode.fps, episode.embodiment) == (10, "xarm")
    assert not [repair for repair in episode.repairs if repair.field == "instruction"]
    assert "observation/instruction" not in episode.signals


def test_a_data_set_that_does_not_fit_its_contract_is_read_as_found(tmp_path):
    fields = {name: kind for name, kind in DROID.items() if "action_dict" not in name}
    record = {name: values for name, values in droid().items() if name in fields}
    episode = one(write_tfds(tmp_path, "droid", fields, [record]))
    assert np.array_equal(episode.action, record["steps/action"].astype(np.float32))
    assert episode.fps == 10 and "control rate unknown; 10 Hz assumed" in said(episode)
    assert said(episode)[-1].startswith("the shipped contract droid does not fit droid (contract: action:")
    assert said(episode)[-1].endswith("; read without it")


@pytest.mark.parametrize(
    ("name", "fields"),
    [("fractal20220817_data", FRACTAL), ("droid", DROID), ("bridge", BRIDGE_OXE), ("bridge", BRIDGE), ("kuka", KUKA)],
)
def test_an_inferred_contract_agrees_with_the_shipped_one(tmp_path, name, fields):
    record = droid() if name == "droid" else recorded(fields)
    write_tfds(tmp_path, name, fields, [record], split="test")
    refs = [ref for format, found in find(tmp_path) for ref in scan(format, found)]
    (tmp_path / "mine.yaml").write_text(contract_yaml(measure(refs, None, refs), name))
    shipped, mine = one(tmp_path), one(tmp_path, DataContract.load(tmp_path / "mine.yaml"))
    assert np.array_equal(shipped.action, mine.action) and shipped.action_layout == mine.action_layout
    for field in ("fps", "embodiment", "instruction", "success"):
        assert getattr(shipped, field) == getattr(mine, field)
    assert shipped.split == mine.split or mine.split == "validation"
    assert shipped.signals.keys() == mine.signals.keys() and shipped.proprio.keys() == mine.proprio.keys()


# ----------------------------------------------------------------------------------------------------- any contract

PICTURES = np.stack([quadrants(16)] * STEPS)


@pytest.fixture
def episode() -> Episode:
    rng = np.random.default_rng(2)

    def rows(width: int) -> np.ndarray:
        return rng.normal(size=(STEPS, width)).astype(np.float32)

    def films(frames: np.ndarray):
        return sliced_video(len(frames), lambda start, stop: frames[start:stop])

    return Episode(
        ref=EpisodeRef("/data/a.rec", "toy", 0, "d"),
        fps=10,
        cameras={"top": films(PICTURES), "wrist": films(numbered(STEPS, 16))},
        proprio={"joints": rows(7), "width": rows(1)},
        action=rows(2),
        action_layout=(ActionBlock(name="drive", size=2, mode="velocity"),),
        instruction="the reader's",
        success=None,
        embodiment="toy",
        repairs=(
            Repair("fps", "control rate unknown; 10 Hz assumed"),
            Repair("embodiment", "robot unknown; the data set's name is used instead"),
            Repair("flip", "images are stored bottom-up (opengl); turned upright"),
            Repair("instruction", "the instruction changes within the episode; the first one is kept"),
            Repair("frames", "camera top is black in every frame"),
        ),
        signals={"target": rows(6), "hand": rows(1), "done": np.eye(STEPS, dtype=np.float32)[:, -1:]},
        texts={"said": "wipe it", "none": ""},
        split="val",
    )


def frames(episode: Episode, camera: str) -> np.ndarray:
    return np.concatenate(list(episode.cameras[camera].frames(None)))


def test_an_empty_contract_changes_nothing(episode):
    same = DataContract().apply(episode)
    for name in ("fps", "instruction", "success", "embodiment", "repairs", "texts", "split", "action_layout"):
        assert getattr(same, name) == getattr(episode, name)
    assert list(same.cameras) == list(episode.cameras)
    for name in ("proprio", "signals"):
        assert getattr(same, name).keys() == getattr(episode, name).keys()
    assert same.action is episode.action


def test_an_action_made_of_signals_and_proprio(episode):
    made = DataContract(action=["target", "action", "width"]).apply(episode)
    parts = [episode.signals["target"], episode.action, episode.proprio["width"]]
    assert np.array_equal(made.action, np.concatenate(parts, axis=1))
    assert [(b.name, b.size, b.mode) for b in made.action_layout] == [
        ("target", 6, "unknown"),
        ("drive", 2, "velocity"),
        ("width", 1, "unknown"),
    ]
    assert set(made.signals) == {"hand", "done"} and set(made.proprio) == {"joints", "width"}
    other = DataContract(action=["target"]).apply(episode)
    assert np.array_equal(other.signals["action"], episode.action)  # the reader's own action is kept


def test_proprio_is_chosen_and_renamed(episode):
    chosen = DataContract(proprio={"joints": "arm", "hand": "gripper"}).apply(episode)
    assert np.array_equal(chosen.proprio["arm"], episode.proprio["joints"])
    assert np.array_equal(chosen.proprio["gripper"], episode.signals["hand"])
    assert list(chosen.proprio) == ["arm", "gripper"]
    assert set(chosen.signals) == {"target", "done", "width"}
    both = DataContract(action=["hand"], proprio={"hand": "last", "action": "before"}).apply(episode)
    assert np.array_equal(both.action, both.proprio["last"])
    assert np.array_equal(both.proprio["before"], episode.action)
    assert set(both.signals) == {"target", "done", "joints", "width"}
    assert DataContract(proprio={}).apply(episode).proprio == {}


def test_cameras_are_renamed_flipped_and_recoloured(episode):
    shown = DataContract(cameras={"top": "front"}, flip=["top"], bgr=["top"]).apply(episode)
    assert list(shown.cameras) == ["front"]
    assert np.array_equal(frames(shown, "front"), PICTURES[:, ::-1, :, ::-1])
    assert np.array_equal(frames(DataContract(bgr=["top"]).apply(episode), "top"), PICTURES[..., ::-1])
    assert np.array_equal(frames(DataContract(flip=[]).apply(episode), "top"), PICTURES)


def test_rotations_are_converted(episode):
    layout = [
        {"name": "p", "size": 3, "kind": "position"},
        {"name": "r", "size": 3, "kind": "rotation", "representation": "axis_angle", "mode": "absolute"},
    ]
    turned = DataContract(action=["target"], action_layout=layout, rotations="quaternion_wxyz").apply(episode)
    target = episode.signals["target"]
    quaternions = Rotation.from_rotvec(target[:, 3:]).as_quat()[:, [3, 0, 1, 2]]
    quaternions *= np.where(quaternions[:, :1] < 0, -1, 1)
    assert np.allclose(turned.action, np.concatenate([target[:, :3], quaternions], axis=1), atol=1e-6)
    assert [(b.name, b.size, b.representation) for b in turned.action_layout] == [
        ("p", 3, None),
        ("r", 4, "quaternion_wxyz"),
    ]


def test_instruction_success_splits_rate_and_embodiment(episode):
    told = DataContract(
        instruction_field="said", success_field="done", splits={"val": "validation"}, fps=30, embodiment="arm"
    ).apply(episode)
    assert (told.instruction, told.success, told.split) == ("wipe it", True, "validation")
    assert (told.fps, told.embodiment) == (30, "arm")
    assert DataContract(instruction="do", instruction_field="said").apply(episode).instruction == "do"
    assert DataContract(instruction_field="none").apply(episode).instruction == "the reader's"
    assert DataContract(success_field="target").apply(episode).success == bool((episode.signals["target"] >= 1).any())
    assert DataContract(splits={"train": "train"}).apply(episode).split == "val"


@pytest.mark.parametrize(
    "field, value, dropped",
    [("fps", 5, 0), ("embodiment", "arm", 1), ("flip", [], 2), ("instruction", "do", 3), ("proprio", {}, None)],
)
def test_setting_a_field_drops_its_repairs(episode, field, value, dropped):
    kept = [repair for number, repair in enumerate(episode.repairs) if number != dropped]
    assert list(DataContract(**{field: value}).apply(episode).repairs) == kept


@pytest.mark.parametrize(
    "contract, says",
    [
        ({"action": ["aim"]}, r"action: 'aim' is not in /data/a.rec; recorded are: action, done, hand, joints, target"),
        ({"proprio": {"aim": "a"}}, "proprio: 'aim' is not in /data/a.rec; recorded are: action, done, hand"),
        ({"proprio": {"joints": "a", "width": "a"}}, "proprio: two entries map to the same name: a, a"),
        ({"cameras": {"side": "s"}}, "cameras: 'side' is not in /data/a.rec; recorded are: top, wrist"),
        ({"cameras": {"top": "s", "wrist": "s"}}, "cameras: two entries map to the same name: s, s"),
        ({"bgr": ["side"]}, "bgr: 'side' is not in"),
        ({"instruction_field": "task"}, "instruction_field: 'task' is not in /data/a.rec; recorded are: none, said"),
        ({"success_field": "won"}, "success_field: 'won' is not in /data/a.rec; recorded are: action, done"),
        ({"action_layout": [{"name": "a", "size": 3}]}, "action_layout has 3 columns, the actions of .* have 2"),
    ],
)
def test_a_misfit_lists_the_recorded_names(episode, contract, says):
    with pytest.raises(UserError, match=says):
        DataContract.model_validate(contract).apply(episode)


@pytest.mark.parametrize(
    "written, says",
    [
        ("fps: 0", "fps: Input should be greater than 0"),
        ("speed: 3", "speed: Extra inputs are not permitted; known keys: name, datasets"),
        ("action: []", "action: Tuple should have at least 1 item"),
        ("[1, 2]", "top level: Input should be a valid dictionary"),
        ("{", "not YAML"),
        ("splits: {val: held out}", "splits.val: Input should be 'train' or 'validation'"),
        (
            "action_layout: [{name: r, size: 4, kind: rotation, representation: euler_xyz}]",
            "action_layout: Value error, r: a rotation as euler_xyz has 3 columns",
        ),
        (
            "action_layout: [{name: r, size: 3, representation: euler_xyz}]",
            "action_layout: Value error, r: has a representation, but is of kind other, not rotation",
        ),
    ],
)
def test_an_invalid_contract_is_reported_in_one_line(tmp_path, written, says):
    (tmp_path / "c.yaml").write_text(written)
    with pytest.raises(UserError, match=says) as raised:
        DataContract.load(tmp_path / "c.yaml")
    assert "\n" not in str(raised.value)


def test_a_contracts_digest_ignores_its_name(tmp_path):
    contract = DataContract.load("droid")
    (tmp_path / "mine.yaml").write_text(contract.model_copy(update={"name": None}).to_yaml())
    mine = DataContract.load(tmp_path / "mine.yaml")
    assert mine.name == "mine" and mine.digest == contract.digest != DataContract.load("kuka").digest
    with pytest.raises(UserError, match=r"no such contract file, and not one of the shipped: .*bridge, bridge_oxe"):
        DataContract.load("brigde")


# ------------------------------------------------------------------------------------------------------- rotations

representations = st.sampled_from(sorted(WIDTHS))
directions = st.lists(st.floats(-1, 1), min_size=4, max_size=4).filter(lambda q: np.linalg.norm(q) > 0.1)
quaternions = st.lists(directions, min_size=1, max_size=4).map(np.array)


def matrices(quaternions: np.ndarray) -> np.ndarray:
    """Rotation matrices of quaternions (x, y, z, w), from the definition."""
    x, y, z, w = (quaternions / np.linalg.norm(quaternions, axis=1, keepdims=True)).T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.moveaxis(np.array(rows), -1, 0).reshape(-1, 9)


@settings(max_examples=300, deadline=None)
@given(quaternions, representations, representations)
def test_any_rotation_is_the_same_in_every_representation(given, first, second):
    there = convert_rotation(given, "quaternion_xyzw", first)
    on = convert_rotation(there, first, second)
    assert there.shape[1] == WIDTHS[first] and on.shape[1] == WIDTHS[second]
    assert np.allclose(convert_rotation(on, second, "matrix"), matrices(given), atol=1e-6)
    assert np.allclose(convert_rotation(-given, "quaternion_xyzw", "matrix"), matrices(given), atol=1e-9)


@settings(max_examples=100, deadline=None)
@given(quaternions)
def test_the_numbers_of_each_representation(given):
    whole = matrices(given)
    assert np.allclose(convert_rotation(given, "quaternion_xyzw", "rotation_6d"), whole[:, :6], atol=1e-9)
    angles = convert_rotation(given, "quaternion_xyzw", "euler_xyz")
    assert (np.abs(angles[:, 1]) <= np.pi / 2 + 1e-9).all()
    a, b, c = angles.T
    first_column = np.stack([np.cos(b) * np.cos(c), np.cos(b) * np.sin(c), -np.sin(b)], axis=1)
    assert np.allclose(first_column, whole[:, [0, 3, 6]], atol=1e-6)
    last_row = np.stack([-np.sin(b), np.cos(b) * np.sin(a), np.cos(b) * np.cos(a)], axis=1)
    assert np.allclose(last_row, whole[:, 6:], atol=1e-6)
    for name, real in (("quaternion_xyzw", 3), ("quaternion_wxyz", 0)):
        assert (convert_rotation(given, "quaternion_xyzw", name)[:, real] >= 0).all()


@pytest.mark.parametrize("given, wanted", list(permutations(sorted(WIDTHS), 2)))
def test_a_wrong_width_is_refused(given, wanted):
    for shape in ((2, WIDTHS[given] + 1), (2, 0), (WIDTHS[given],)):
        with pytest.raises(BadEpisode, match=f"a rotation as {given} has {WIDTHS[given]} numbers"):
            convert_rotation(np.ones(shape), given, wanted)


@pytest.mark.parametrize(
    "values, given",
    [
        ([0, 0, 0, 0], "quaternion_xyzw"),
        ([0, 0, 0, 0], "quaternion_wxyz"),
        ([0, 0, 0, 1, 2, 3], "rotation_6d"),
        ([1, 2, 3, 0, 0, 0], "rotation_6d"),
        ([1, 2, 3, -2, -4, -6], "rotation_6d"),
        (np.float32([0.1, 0.2, 0.3, 0.33, 0.66, 0.99]), "rotation_6d"),
        (np.float32([1, 2, 3, 1000.1, 2000.2, 3000.3]), "rotation_6d"),
        ([0] * 9, "matrix"),
        ([1, 0, 0, 0, 1, 0, 0, 0, -1], "matrix"),
        ([np.nan, 0, 0], "euler_xyz"),
        ([np.inf, 0, 0], "axis_angle"),
        ([np.nan, 0, 0, 1], "quaternion_xyzw"),
    ],
)
def test_numbers_that_are_not_a_rotation(values, given):
    fine = convert_rotation(np.array([[0, 0, 0, 1.0]]), "quaternion_xyzw", given)
    with pytest.raises(BadEpisode, match="no rotation"):
        convert_rotation(np.concatenate([fine, [values]]), given, "axis_angle")


def test_rotations_in_other_units():
    def block(**more: str) -> ActionBlock:
        return ActionBlock(name="r", size=3, kind="rotation", representation="euler_xyz", **more)

    angles = np.array([[10, 20, 30]], np.float32)
    action, (turned,) = with_rotations(angles, (block(unit="deg"),), "matrix")
    assert np.allclose(action, Rotation.from_euler("xyz", angles, degrees=True).as_matrix().reshape(1, 9), atol=1e-6)
    assert turned.unit == "unknown" and with_rotations(angles, (block(),), "axis_angle")[1][0].unit == "rad"
    with pytest.raises(UserError, match="r is scaled, so its angles are unknown"):
        with_rotations(angles, (block(unit="scaled"),), "matrix")
    with pytest.raises(UserError, match="the representation of r is unknown"):
        with_rotations(angles, (ActionBlock(name="r", size=3, kind="rotation"),), "matrix")
    with pytest.raises(UserError, match="the action has no block of kind rotation"):
        with_rotations(angles, (ActionBlock(name="r", size=3),), "matrix")
    speeds, layout = with_rotations(angles, (block(mode="velocity"),), "matrix")
    assert np.array_equal(speeds, angles) and layout == (block(mode="velocity"),)
