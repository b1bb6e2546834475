//! What a model is to learn: the files that a user's names mean.

use std::path::Path;

use anyhow::{Context, Result};
use bevel_formats::hub::{self, HubConfig, RepoId};
use bevel_formats::records::{self, DataFile, Kind};

use crate::args::Global;
use crate::ui::progress::Fetch;

/// The files of paths, of directories and of the hub's data sets, in the order of the names.
pub(crate) fn files(names: &[String], global: &Global) -> Result<Vec<DataFile>> {
    let mut files = Vec::new();
    for name in names {
        if let Some(name) = name.strip_prefix("hub:") {
            let repo: RepoId = name.parse()?;
            let config = HubConfig::from_env();
            let found = hub::fetch_data_set(&config, &repo, u64::MAX, &mut Fetch::new(global))?;
            files.extend(found.iter().map(|path| file(path)));
            continue;
        }
        let path = Path::new(name);
        let is_stdin = name == "-";
        if !is_stdin
            && std::fs::metadata(path).with_context(|| format!("cannot read `{name}`"))?.is_dir()
        {
            let found = records::directory(path)?;
            if let Some(first) = found.left_out.first() {
                let (count, first) = (found.left_out.len(), first.display());
                global.warn(format!(
                    "`{name}` has {count} files that hold no data by their names, such as `{first}`; they are left out"
                ));
            }
            files.extend(found.files);
        } else {
            files.push(file(path));
        }
    }
    Ok(files)
}

/// A name that says nothing is taken for lines of JSON.
fn file(path: &Path) -> DataFile {
    DataFile { path: path.to_owned(), kind: records::kind(path).unwrap_or(Kind::JsonLines) }
}
