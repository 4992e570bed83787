"""How long artifacts take, and how much memory."""
