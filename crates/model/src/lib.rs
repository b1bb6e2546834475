//! decoder models: configuration, weights, forward pass, tokenizer, chat template
