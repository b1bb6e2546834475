//! The recipe parser's fuzz target, replayed and mutated for a short time.

use std::time::Duration;

use bevel::compress::Recipe;

use crate::replay::{corpus, replay};

#[test]
fn recipes_parse_or_are_refused() {
    for seed in ["budget.toml", "full.toml", "imatrix.toml", "least.toml"] {
        let text = std::fs::read_to_string(corpus("recipe").join(seed)).unwrap();
        assert!(text.parse::<Recipe>().is_ok(), "`{seed}` is refused");
    }
    // A parsed TOML document holds some hundred bytes for each key and value.
    replay("recipe", Duration::from_secs(2), 1 << 20, |bytes| {
        let Ok(text) = std::str::from_utf8(bytes) else { return };
        if let Ok(recipe) = text.parse::<Recipe>() {
            assert_eq!(recipe.to_string().parse::<Recipe>().ok(), Some(recipe));
        }
    });
}
