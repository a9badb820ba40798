"""How far judging pictures is hidden behind drawing them."""
