"""Cartpole swing-up, each action held for 8 steps of dm_control, as by dmc2gym's frame_skip.

    pip install 'shimmy[dm-control]'
    python qsm.py --env-id docs.swingup:CartpoleSwingup-v0

An action then lasts 0.08 s and an episode 125 actions; rewards are summed, so that returns compare
with the task's.
"""

import gymnasium as gym
import shimmy

HOLD = 8


class HeldActions(gym.Wrapper):
    def step(self, action):
        total = 0.0
        for _ in range(HOLD):
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += reward
            if terminated or truncated:
                break
        return obs, total, terminated, truncated, info


gym.register_envs(shimmy)
gym.register(
    "CartpoleSwingup-v0",
    lambda **flags: HeldActions(gym.make("dm_control/cartpole-swingup-v0", **flags)),
)
