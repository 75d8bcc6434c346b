"""Overrides for write_tiny, so that what is compiled for one test serves the next."""

# Rows of whole superblocks of 256, so that no type falls back to another.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_attention_heads": 4}
# Rows of whole groups of 128, as folders have them.
GROUPED = {"hidden_size": 128, "intermediate_size": 256}
