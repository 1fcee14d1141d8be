from __future__ import annotations

import pytest

from preprocessing.dataset.slots import assign_slots, share_slots

PANDA, UR5, WIDOWX = ("ext1", "ext2", "wrist"), ("wrist",), ("wrist", "ext1")


@pytest.mark.parametrize(
    ("slots", "rigs", "expected"),
    [
        (3, [PANDA, UR5, WIDOWX], [PANDA, ("", "", "wrist"), ("ext1", "", "wrist")]),
        (3, [UR5, WIDOWX, PANDA], [("wrist",), ("wrist", "ext1"), ("wrist", "ext1", "ext2")]),
        # wrist cameras of other names; a camera of another kind stays out of their slot
        (3, [PANDA, ("hand_camera",), ("video",)], [PANDA, ("", "", "hand_camera"), ("video",)]),
        (2, [("front", "robot0_eye_in_hand"), ("palm", "top")], [("front", "robot0_eye_in_hand"), ("top", "palm")]),
        (2, [("cam_handheld", "gripper"), ("overhead",)], [("cam_handheld", "gripper"), ("overhead",)]),
        # an order in which placing one rig after the other would fail
        (2, [("p", "q"), ("r", "s"), ("p", "r")], [("p", "q"), ("s", "r"), ("p", "r")]),
        # three names that are all beside each other do not fit into two slots
        (2, [("p", "q"), ("q", "r"), ("p", "r")], [("p", "q"), ("r", "q"), ("p", "r")]),
        (1, [("front",), ("wrist",)], [("front",), ("wrist",)]),
    ],
)
def test_cameras_of_the_same_name_or_kind_share_a_slot(
    slots: int, rigs: list[tuple[str, ...]], expected: list[tuple[str, ...]]
) -> None:
    assert share_slots(rigs, slots) == expected


def test_new_cameras_take_the_slots_of_known_ones_of_their_name_or_kind() -> None:
    known = [("front", 0), ("wrist", 1)]
    assert assign_slots(("gripper_cam", "side"), (), known) == ("side", "gripper_cam")
    assert assign_slots(("left_wrist", "right_wrist", "top"), (), known) == ("top", "left_wrist", "right_wrist")
    assert assign_slots(("wrist", "top"), ("wrist",), known) == ("wrist", "top")
