#![no_main]

libfuzzer_sys::fuzz_target!(|text: &str| {
    if let Ok(recipe) = text.parse::<bevel_compress::Recipe>() {
        assert_eq!(recipe.to_string().parse::<bevel_compress::Recipe>().ok(), Some(recipe));
    }
});
