"""Scored layers in a graph of torch.compile."""
