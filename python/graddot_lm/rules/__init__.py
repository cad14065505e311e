"""How layers of every kind are scored."""
