#![no_main]

#[path = "../quantized.rs"]
mod quantized;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    quantized::quantized(bytes);
});
