"""Janus from nothing on handwritten digits: `python -m train.main --config digits`, about ten minutes on two cores.

A VQ tokenizer and then all three stages are trained on scikit-learn's 1,797 digits, and the model is judged on those it
has not seen. `python -m examples.digits.spread RUN...` tells what runs with several seeds come to together.
"""
