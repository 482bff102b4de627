"""Reading tables and texts, packing, tokenizers trained on them."""
