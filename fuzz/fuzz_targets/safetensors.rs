#![no_main]

use std::path::Path;

use bevel_formats::safetensors::Header;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok(header) = Header::parse(Path::new("fuzz.safetensors"), bytes) {
        for info in header.tensors.values() {
            assert!(info.range().end <= bytes.len() && info.range().start >= header.data_start);
        }
    }
});
