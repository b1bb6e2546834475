//! perplexity and speed measurements
