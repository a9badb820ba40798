"""From logits to pictures and answers."""
