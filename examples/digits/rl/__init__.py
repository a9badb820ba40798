"""Reinforcement learning and preferences for the trained digits, judged by classifiers."""
