"""Files, messages and commands, safe with untrusted input."""
