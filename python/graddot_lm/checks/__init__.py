"""What the first step proves of a model and its loss, and what stays checked afterwards."""
