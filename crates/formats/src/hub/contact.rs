//! The first question to a hub, which decides whether it or the cache answers.

use super::client::Client;
use super::select::Sibling;
use super::{Error, HubConfig, Progress, RepoId, Result};

/// Attempts to reach a hub at all. One that stops answering later gets all of `config.attempts`.
const FIRST_CONTACT: u32 = 3;

/// Where a repository's files come from.
pub(super) enum Contact<'a, T> {
    /// From the cache, which has this.
    Cache(T),
    /// From the hub: the commit that the revision stands for, and its files.
    Hub { client: Client<'a>, commit: String, siblings: Vec<Sibling> },
}

/// Asks the hub for a repository's commit, unless what is `cached` makes that needless; where it
/// cannot be reached the cache serves, and `progress` is told.
pub(super) fn contact<'a, T>(
    config: &'a HubConfig,
    repo: &RepoId,
    cached: Result<T>,
    progress: &mut dyn Progress,
) -> Result<Contact<'a, T>> {
    if config.offline || (repo.is_commit() && cached.is_ok()) {
        return cached.map(Contact::Cache);
    }
    let client = Client::new(config)?;
    // A snapshot at hand is a reason not to keep a user waiting for a hub that does not answer.
    let attempts = if cached.is_ok() { 1 } else { config.attempts.min(FIRST_CONTACT) };
    match (client.info(repo, attempts, progress), cached) {
        (Ok((commit, siblings)), _) => Ok(Contact::Hub { client, commit, siblings }),
        (Err(Error::Unreachable { why, .. }), Ok(found)) => {
            let hub = &config.endpoint;
            progress.note(&format!(
                "The hub ({hub}) cannot be reached ({why}); using the copy of `{repo}` in the cache."
            ));
            Ok(Contact::Cache(found))
        }
        (Err(error), _) => Err(error),
    }
}
