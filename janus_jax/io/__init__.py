"""Files, messages and commands, safe against whatever somebody else wrote."""
