"""From text to samples of tokens: datasets, tokenizers, chat templates."""
