#![no_main]

use std::path::Path;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok(header) = bevel_formats::gguf::Header::parse(Path::new("fuzz.gguf"), bytes) {
        for info in header.tensors.values() {
            assert!(info.range().end <= bytes.len() && info.range().start >= header.data_start);
        }
    }
});
