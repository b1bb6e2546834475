//! Memory does not grow with the model.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use bevel_base::DType;
use bevel_model::ModelConfig;

use crate::support::{convert, hf_config, recipe, write_gguf};

/// Counts what is allocated at a time.
struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Relaxed) + layout.size();
        PEAK.fetch_max(live, Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn quantizing_takes_a_small_part_of_the_model() {
    let directory = tempfile::tempdir().unwrap();
    let (source, out) = (directory.path().join("a.gguf"), directory.path().join("b.gguf"));
    let mut json = hf_config("llama");
    json["hidden_size"] = 2048.into();
    json["intermediate_size"] = 8192.into();
    let config = ModelConfig::from_hf(&json, "test").unwrap();
    write_gguf(&source, &config, DType::F16, |_, len| vec![0.25; len]);
    let model = std::fs::metadata(&source).unwrap().len() as usize;
    assert!(model > 200_000_000, "the model has {model} bytes");

    PEAK.store(LIVE.load(Relaxed), Relaxed);
    let before = LIVE.load(Relaxed);
    convert(&source, &recipe("type = \"Q8_0\""), &out).unwrap();
    // Tests that run at the same time are counted too.
    let grown = PEAK.load(Relaxed).saturating_sub(before);
    assert!(grown < 50_000_000, "{grown} bytes were allocated for a model of {model}");
}
