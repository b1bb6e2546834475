use bevel_model::tokenizer::{TokenKind, Tokenizer};

use crate::{Error, Result};

/// Checks that every id stands for the same token in both vocabularies. Ids that one of them leaves
/// unused, as the padding at the end of an embedding is, do not count.
///
/// # Errors
/// [`Error::Vocabulary`] with the first token that differs.
pub fn check_vocabulary(base: &Tokenizer, other: &Tokenizer) -> Result<()> {
    let used = |tokenizer: &Tokenizer, id: u32| match tokenizer.kind(id) {
        None | Some(TokenKind::Unused) => None,
        Some(_) => tokenizer.token(id).map(str::to_owned),
    };
    for id in 0..base.vocab_size().min(other.vocab_size()) as u32 {
        if let (Some(a), Some(b)) = (used(base, id), used(other, id))
            && a != b
        {
            return Err(Error::Vocabulary(format!(
                "token {id} is `{a}` in the base and `{b}` in the model; both must have one vocabulary"
            )));
        }
    }
    Ok(())
}
