"""Rewards: functions that judge drawn pictures, called while the devices go on.

A reward is a plain function (pictures uint8 [N, h, w, 3], prompts, metadata) -> N numbers, named in a run's config by
its import path, see `train.rl.config.RewardConfig`: one of the modules here, or anybody's.
"""

from train.rl.rewards.scoring import Handle, Rewards, Scores

__all__ = ["Handle", "Rewards", "Scores"]
