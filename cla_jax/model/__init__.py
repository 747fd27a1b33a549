"""The transformer: layers, attention, and the groups that share keys and values."""
