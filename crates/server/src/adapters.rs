//! The adapters of a served model. Each has a name, by which requests choose it as they do a model, and a number, by
//! which they may choose several.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bevel_model::{Adapter, ScaledAdapter};
use serde::Deserialize;

use crate::api::error::ApiError;

/// An adapter to be served with its model.
#[derive(Clone, Debug)]
pub struct AdapterToServe {
    /// What clients call it.
    pub name: String,
    /// Where it lies.
    pub path: PathBuf,
    /// The adapter.
    pub adapter: Arc<Adapter>,
    /// How strongly it counts where it is chosen by its name.
    pub scale: f32,
}

/// Reads an adapter of a model while the model is served.
pub type AdapterLoader = Box<dyn Fn(&Path) -> Result<Adapter, String> + Send + Sync>;

/// Those of one model.
pub(crate) struct Adapters {
    load: Option<AdapterLoader>,
    list: Mutex<List>,
}

struct List {
    all: Vec<ServedAdapter>,
    next: usize,
}

/// An adapter that requests can choose.
#[derive(Clone, Debug)]
pub(crate) struct ServedAdapter {
    pub(crate) id: usize,
    pub(crate) served: AdapterToServe,
    /// How strongly it counts for requests that name the model and say nothing of adapters.
    pub(crate) usual_scale: f32,
}

/// How strongly an adapter is to count, as llama-server has it.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Scale {
    id: usize,
    scale: f32,
}

impl fmt::Debug for Adapters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.all().iter().map(|adapter| &adapter.served.name)).finish()
    }
}

impl Adapters {
    /// These, and with a loader those that clients want loaded.
    pub(crate) fn new(adapters: Vec<AdapterToServe>, load: Option<AdapterLoader>) -> Self {
        let mut list = List { all: Vec::new(), next: 0 };
        adapters.into_iter().for_each(|adapter| list.add(adapter));
        Self { load, list: Mutex::new(list) }
    }

    fn list(&self) -> MutexGuard<'_, List> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn all(&self) -> Vec<ServedAdapter> {
        self.list().all.clone()
    }

    pub(crate) fn named(&self, name: &str) -> Option<ServedAdapter> {
        self.list().all.iter().find(|adapter| adapter.served.name == name).cloned()
    }

    /// What requests get that say nothing of adapters.
    pub(crate) fn usual(&self) -> Vec<ScaledAdapter> {
        let all = self.all();
        all.iter().filter_map(|adapter| adapter.scaled(adapter.usual_scale)).collect()
    }

    /// What a request gets that says how strongly each counts; others do not count. `field` is what it says it by.
    pub(crate) fn chosen(
        &self,
        field: &str,
        scales: &[Scale],
    ) -> Result<Vec<ScaledAdapter>, ApiError> {
        check(field, &self.all(), scales)?;
        let scale = |adapter: &ServedAdapter| scales.iter().rfind(|scale| scale.id == adapter.id);
        let scaled = |adapter: &ServedAdapter| adapter.scaled(scale(adapter)?.scale);
        Ok(self.all().iter().filter_map(scaled).collect())
    }

    /// Says how strongly each counts from now on where requests do not say; those left out do not count.
    pub(crate) fn set_usual(&self, scales: &[Scale]) -> Result<(), ApiError> {
        let mut list = self.list();
        check("", &list.all, scales)?;
        for adapter in &mut list.all {
            let scale = scales.iter().rfind(|scale| scale.id == adapter.id);
            adapter.usual_scale = scale.map_or(0.0, |scale| scale.scale);
        }
        Ok(())
    }

    /// Reads a further one. It takes time: not for async.
    pub(crate) fn load(&self, name: String, path: PathBuf) -> Result<(), ApiError> {
        let load = self.loader()?;
        let adapter = load(&path).map_err(|problem| ApiError::field("lora_path", problem))?;
        let served = AdapterToServe { name, path, adapter: Arc::new(adapter), scale: 1.0 };
        self.list().add(served);
        Ok(())
    }

    /// Forgets one. Requests that have it keep it until they end.
    pub(crate) fn unload(&self, name: &str) -> Result<(), ApiError> {
        self.loader()?;
        self.list().all.retain(|adapter| adapter.served.name != name);
        Ok(())
    }

    /// What reads adapters, where clients may want it.
    pub(crate) fn loader(&self) -> Result<&AdapterLoader, ApiError> {
        self.load.as_ref().ok_or_else(|| {
            let problem = "clients of this server load no adapters, as that reads files of it: start it with --adapter-loading to let them";
            ApiError::new(axum::http::StatusCode::FORBIDDEN, problem)
        })
    }
}

impl List {
    fn add(&mut self, served: AdapterToServe) {
        self.all.push(ServedAdapter { id: self.next, served, usual_scale: 0.0 });
        self.next += 1;
    }
}

impl ServedAdapter {
    /// It counting so strongly; `None` where it does not count.
    fn scaled(&self, scale: f32) -> Option<ScaledAdapter> {
        let adapter = self.served.adapter.clone();
        (scale != 0.0).then_some(ScaledAdapter { adapter, scale })
    }

    /// It counting as it does where it is chosen by name.
    pub(crate) fn by_name(&self) -> Vec<ScaledAdapter> {
        self.scaled(self.served.scale).into_iter().collect()
    }
}

/// Refuses scales of what is not there, and those that are no numbers.
fn check(field: &str, all: &[ServedAdapter], scales: &[Scale]) -> Result<(), ApiError> {
    for (i, Scale { id, scale }) in scales.iter().enumerate() {
        if all.iter().all(|adapter| adapter.id != *id) {
            let problem = format!("no adapter has the number {id}; /lora-adapters lists them");
            return Err(ApiError::field(format!("{field}[{i}].id"), problem));
        }
        if !scale.is_finite() {
            let problem = "expected a number of single precision";
            return Err(ApiError::field(format!("{field}[{i}].scale"), problem));
        }
    }
    Ok(())
}
