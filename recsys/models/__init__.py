"""Neural models, written for one device; embeddings are handed in."""
