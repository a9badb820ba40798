"""The three-stage training recipe of Janus-Pro: data, loss, step and loop."""
