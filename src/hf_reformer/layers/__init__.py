"""Reformer layers and their modules: attention, feed-forward and position embeddings."""
