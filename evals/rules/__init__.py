"""From a reply to an answer: the rules of each tool, word for word."""
