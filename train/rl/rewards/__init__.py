"""Rewards: functions that judge drawn pictures, or answers, called while the devices go on.

A reward is a plain function (pictures uint8 [N, h, w, 3], prompts, metadata) -> N numbers, or of answers, a list of N
texts: (answers, prompts, metadata). It is named in a run's config by its import path, see
`train.rl.config.RewardConfig`: one of the modules here, or anybody's. The name of its first argument says what it
judges; one of another name is taken for either.
"""

from train.rl.rewards.scoring import Handle, Rewards, Scores

__all__ = ["Handle", "Rewards", "Scores"]
