"""Reinforcement learning of drawing and answering (GRPO), and preferences (DPO), as steps of the one trainer."""
