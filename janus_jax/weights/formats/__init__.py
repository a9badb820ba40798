"""Files of tensors that torch writes, read without torch."""
