"""Reinforcement learning and preferences for drawing."""
