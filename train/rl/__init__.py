"""Reinforcement learning and preferences for drawing: GRPO and DPO as steps of the one trainer."""
