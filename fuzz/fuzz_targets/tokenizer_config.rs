#![no_main]

#[path = "../model.rs"]
#[allow(dead_code)] // the other targets' functions
mod model;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    model::tokenizer_config(bytes);
});
