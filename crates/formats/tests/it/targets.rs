//! The fuzz targets of this crate, replayed and mutated for a short time.

use std::path::Path;
use std::time::Duration;

use bevel_formats::imatrix::Imatrix;
use bevel_formats::parquet::parse_records;
use bevel_formats::{gguf, safetensors};

use crate::fuzz_quantized;
use crate::replay::replay;

const TIME: Duration = Duration::from_secs(3);

/// Bytes a header may take, however short its file is.
const OVERHEAD: usize = 64 << 10;

#[test]
fn gguf_headers() {
    replay("gguf", TIME, OVERHEAD, |bytes| {
        if let Ok(header) = gguf::Header::parse(Path::new("fuzz.gguf"), bytes) {
            for info in header.tensors.values() {
                assert!(info.range().end <= bytes.len() && info.range().start >= header.data_start);
            }
        }
    });
}

#[test]
fn safetensors_headers() {
    replay("safetensors", TIME, OVERHEAD, |bytes| {
        if let Ok(header) = safetensors::Header::parse(Path::new("fuzz.safetensors"), bytes) {
            for info in header.tensors.values() {
                assert!(info.range().end <= bytes.len() && info.range().start >= header.data_start);
            }
        }
    });
}

#[test]
fn safetensors_indexes() {
    replay("safetensors_index", TIME, OVERHEAD, |bytes| {
        if let Ok(places) = safetensors::parse_index(Path::new("fuzz.index.json"), bytes) {
            assert!(places.values().all(|file| Path::new(file).components().count() == 1));
        }
    });
}

#[test]
fn importance_matrices() {
    replay("imatrix", TIME, OVERHEAD, |bytes| {
        if let Ok(found) = Imatrix::parse(Path::new("fuzz.imatrix"), bytes) {
            for entry in found.entries.values() {
                assert!(entry.mean_squares().iter().all(|mean| !mean.is_nan()));
            }
        }
    });
}

#[test]
fn parquet_files() {
    // A zstd frame may ask for a window of 8 MB, and a page unpack to more than its rows take.
    replay("parquet", TIME, 16 << 20, |bytes| {
        let mut rows = 0;
        let _ = parse_records(Path::new("fuzz.parquet"), bytes, 1000, &mut |_| rows += 1);
        assert!(rows <= 1000);
    });
}

#[test]
fn quantized_checkpoints() {
    replay("quantized", TIME, OVERHEAD, fuzz_quantized::quantized);
}
