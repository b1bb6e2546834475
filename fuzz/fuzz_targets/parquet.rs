#![no_main]

use std::path::Path;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let mut rows = 0;
    let path = Path::new("fuzz.parquet");
    let _ = bevel_formats::parquet::parse_records(path, bytes, 1000, &mut |_| rows += 1);
    assert!(rows <= 1000);
});
