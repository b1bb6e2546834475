#![no_main]

use std::path::Path;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok(found) = bevel_formats::imatrix::Imatrix::parse(Path::new("fuzz.imatrix"), bytes) {
        for entry in found.entries.values() {
            assert!(entry.mean_squares().iter().all(|mean| !mean.is_nan()));
        }
    }
});
