"""Janus from scratch on handwritten digits: `python -m train.main --config digits`, about ten minutes on two cores.

A VQ tokenizer and then all three stages are trained on scikit-learn's 1,797 digits, and the model is evaluated on
held-out ones. `python -m examples.digits.spread RUN...` summarizes runs with several seeds.
"""
