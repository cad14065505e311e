"""Sizes of GPT-2, for whoever builds one, and for options, which do not wait for torch."""

# Radford et al. (2019), table 2, but for Tiny, which trains in minutes on a CPU.
ARCHITECTURES = {
    "GPT2-Tiny": {"n_layer": 4, "n_head": 4, "n_embd": 128},
    "GPT2-Small": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "GPT2-Medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "GPT2-Large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "GPT2-XL": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
}
