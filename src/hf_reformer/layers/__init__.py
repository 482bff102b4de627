"""The modules of a layer: attention, feed-forward, position embeddings, and the layer itself."""
