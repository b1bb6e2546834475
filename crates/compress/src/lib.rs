//! quantization and conversion of models
