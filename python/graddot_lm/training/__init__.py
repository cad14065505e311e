"""`graddot train`: GPT-2 on tokenized domains."""
