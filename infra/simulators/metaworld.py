"""Meta-World: a Sawyer arm, two cameras, 50 tasks, and scripted experts for demonstrations.

Observations hold frames and proprioception only, so a policy has to use the cameras. The expert uses the full state.

Notable:
- One step is ``ACTION_REPEAT`` of Meta-World's 80 Hz steps, in recording and in evaluation, so that a policy runs at
  the rate it was trained on.
- The initial state depends only on the seed passed to ``reset``, not on earlier episodes.
- Rendering costs ten times the physics, so shadows, reflections and multisampling are off.
"""

from __future__ import annotations

import atexit
import os
import warnings
import weakref
from ctypes.util import find_library
from typing import Any

import numpy as np

from infra.simulators.face import Observation
from preprocessing.contracts.interface import Interface
from preprocessing.episode import ActionBlock

# Both are read once, when mujoco and Mesa are loaded. Mesa's software renderer starts a thread per core, which is
# slower than one thread for frames this small.
os.environ.setdefault("MUJOCO_GL", "egl")
os.environ.setdefault("LP_NUM_THREADS", "1")
if os.environ["MUJOCO_GL"] == "egl" and find_library("EGL") is None:
    raise ModuleNotFoundError("Meta-World needs EGL to render: apt install libegl1 libgl1 libgl1-mesa-dri")

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mujoco
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE
        from metaworld.policies import ENV_POLICY_MAP
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        f"Meta-World needs the package {missing.name}: pip install 'unified-world-models[sim]'", name=missing.name
    ) from None

CAMERAS = ("agentview", "eye_in_hand")
ACTION_REPEAT = 2
FPS = 80 // ACTION_REPEAT
HORIZON = 400 // ACTION_REPEAT  # steps of an episode: lerobot-eval allows 400 at 80 Hz

INTERFACE = Interface(
    fps=FPS,
    cameras=CAMERAS,
    proprio={"state": 4},
    action_dim=4,
    action_layout=(
        ActionBlock(name="position", size=3, kind="position", mode="delta", frame="base", unit="scaled"),
        ActionBlock(name="gripper", size=1, kind="gripper", mode="absolute", gripper_one_means="closed"),
    ),
)

INSTRUCTIONS = {
    "assembly": "put the ring on the peg",
    "basketball": "put the basketball through the hoop",
    "bin-picking": "move the cube from one bin to the other",
    "box-close": "put the lid on the box",
    "button-press": "press the button",
    "button-press-topdown": "press the button from above",
    "button-press-topdown-wall": "press the button from above, over the wall",
    "button-press-wall": "press the button behind the wall",
    "coffee-button": "press the button of the coffee machine",
    "coffee-pull": "pull the mug away from the coffee machine",
    "coffee-push": "push the mug under the coffee machine",
    "dial-turn": "turn the dial",
    "disassemble": "take the ring off the peg",
    "door-close": "close the door",
    "door-lock": "lock the door",
    "door-open": "open the door",
    "door-unlock": "unlock the door",
    "drawer-close": "close the drawer",
    "drawer-open": "open the drawer",
    "faucet-close": "close the faucet",
    "faucet-open": "open the faucet",
    "hammer": "hammer the nail into the box",
    "hand-insert": "put the gripper into the hole",
    "handle-press": "press the handle down",
    "handle-press-side": "press the handle down from the side",
    "handle-pull": "pull the handle up",
    "handle-pull-side": "pull the handle up from the side",
    "lever-pull": "pull the lever up",
    "peg-insert-side": "insert the peg into the hole at the side",
    "peg-unplug-side": "unplug the peg from the side",
    "pick-out-of-hole": "pick the puck out of the hole",
    "pick-place": "pick up the puck and bring it to the goal",
    "pick-place-wall": "bring the puck over the wall to the goal",
    "plate-slide": "slide the plate into the cabinet",
    "plate-slide-back": "slide the plate back out of the cabinet",
    "plate-slide-back-side": "slide the plate back out of the cabinet sideways",
    "plate-slide-side": "slide the plate into the cabinet sideways",
    "push": "push the puck to the goal",
    "push-back": "pull the puck back to the goal",
    "push-wall": "push the puck around the wall to the goal",
    "reach": "reach the goal",
    "reach-wall": "reach the goal over the wall",
    "shelf-place": "put the puck on the shelf",
    "soccer": "kick the ball into the goal",
    "stick-pull": "pull the box with the stick",
    "stick-push": "push the box with the stick",
    "sweep": "sweep the puck off the table",
    "sweep-into": "sweep the puck into the hole",
    "window-close": "close the window",
    "window-open": "open the window",
}


class MetaWorld:
    """One task. Actions are float32 ``[4]`` in [-1, 1]: dx, dy, dz of the hand, and the gripper (> 0 closes).

    Proprioception is {"state": float32 [4]}: position of the hand in metres, and opening of the gripper (0 to 1).

    >>> env = MetaWorld("drawer-close")
    >>> observation, _ = env.reset(seed=0)
    >>> truncated = False
    >>> while not truncated:
    ...     observation, reward, terminated, truncated, info = env.step(policy(observation))
    """

    def __init__(self, task: str, image_size: int = 128):
        self.task = task.removesuffix("-v3")
        if self.task not in INSTRUCTIONS:
            raise ValueError(f"{task}: no such Meta-World task; choose from {', '.join(INSTRUCTIONS)}")
        self.instruction = INSTRUCTIONS[self.task]
        self.rendering = True
        self._steps = 0
        make: Any = ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{self.task}-v3-goal-observable"]
        self._env = make()
        self._env._freeze_rand_vec = False  # otherwise every episode repeats the first one's object positions
        self._env.seeded_rand_vec = True
        self._env.max_path_length = 2**31  # its own limit raises; we truncate at HORIZON
        expert: Any = ENV_POLICY_MAP[f"{self.task}-v3"]
        self._expert = expert()
        self._env.model.vis.quality.offsamples = 0  # read when the renderer is made
        self._renderer = mujoco.Renderer(self._env.model, image_size, image_size)
        # At exit mujoco shuts EGL down, and a renderer that is still open prints a traceback. atexit runs the last
        # registered function first; weakref.finalize would run at the position of the process's first finalizer.
        alive = weakref.ref(self._renderer)
        atexit.register(lambda: (renderer := alive()) and renderer.close())

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        if seed is not None:
            self._env.seed(seed)
        self._full_state, _ = self._env.reset()
        self._steps = 0
        return self._observe(), {"success": False}

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        reward, success = 0.0, False
        for _ in range(ACTION_REPEAT):
            self._full_state, reward, _, _, info = self._env.step(np.clip(action, -1, 1))
            success = success or bool(info["success"])
        self._steps += 1
        # Success does not terminate the episode: demonstrations contain a few more steps.
        return self._observe(), float(reward), False, self._steps >= HORIZON, {"success": success}

    def expert_action(self) -> np.ndarray:
        """Return the scripted expert's action float32 ``[4]`` for the current state. It sees the full state."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of gains that the clipping below makes harmless
            action = self._expert.get_action(self._full_state)
        return np.clip(action, -1, 1).astype(np.float32)

    def close(self) -> None:
        self._renderer.close()
        self._env.close()

    def _observe(self) -> Observation:
        # The first four numbers of Meta-World's observation are proprioception: hand position and gripper opening.
        state = self._full_state[:4].astype(np.float32)
        return {"images": self._frames() if self.rendering else {}, "proprio": {"state": state}}

    def _frames(self) -> dict[str, np.ndarray]:
        # Meta-World mounts corner4 upside down.
        return {"agentview": self._render("corner4")[::-1, ::-1].copy(), "eye_in_hand": self._render("gripperPOV")}

    def _render(self, camera: str) -> np.ndarray:
        self._renderer.update_scene(self._env.data, camera=camera)
        flags = self._renderer.scene.flags  # update_scene resets them
        flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
        flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
        return self._renderer.render()


def make(task: str, image_size: int) -> MetaWorld:
    return MetaWorld(task, image_size)
