"""Text by domain, tokenized: how it is found, written and read."""
