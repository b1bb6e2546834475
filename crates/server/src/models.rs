//! Models that are loaded when they are asked for, and make way for others where memory is limited: the one
//! that was used longest ago goes first, once it has answered.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::http::StatusCode;

use crate::adapters::{AdapterLoader, AdapterToServe, Adapters, ServedAdapter};
use crate::api::error::ApiError;
use crate::served::{Asked, LoadedModel, Served};

/// Loads a model, whenever it is asked to.
pub type Loader = Box<dyn Fn() -> Result<LoadedModel, String> + Send + Sync>;

/// A model to be served.
pub struct ModelToServe {
    /// What clients call it.
    pub name: String,
    /// Bytes that it takes once it is loaded, keys and values counted.
    pub memory: u64,
    /// Tokens of prompt and answer together.
    pub context: usize,
    /// Loads it.
    pub load: Loader,
    /// Its adapters.
    pub adapters: Vec<AdapterToServe>,
    /// Reads further ones, where clients may want that.
    pub load_adapter: Option<AdapterLoader>,
}

impl fmt::Debug for ModelToServe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ModelToServe").field("name", &self.name).finish_non_exhaustive()
    }
}

/// All models of a server.
#[derive(Debug)]
pub(crate) struct Models {
    /// The first one serves requests that name none.
    slots: Vec<Slot>,
    /// Bytes that the loaded ones may take.
    budget: Option<u64>,
    /// Held by whoever loads or unloads.
    changing: tokio::sync::Mutex<()>,
}

/// A model, loaded or not.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) model: ModelToServe,
    pub(crate) adapters: Adapters,
    /// When the server began, in seconds since 1970.
    pub(crate) created: u64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    served: Option<Arc<Served>>,
    /// When somebody last asked for it, or it was seen at work.
    used: Instant,
}

impl Slot {
    fn new(mut model: ModelToServe) -> Self {
        let adapters =
            Adapters::new(std::mem::take(&mut model.adapters), model.load_adapter.take());
        let created = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let state = Mutex::new(State { served: None, used: Instant::now() });
        Self { model, adapters, created, state }
    }

    /// The model, if it is loaded.
    pub(crate) fn loaded(&self) -> Option<Arc<Served>> {
        self.state().served.clone()
    }

    /// The same, for somebody who asks for it.
    fn used(&self) -> Option<Arc<Served>> {
        let mut state = self.state();
        state.used = Instant::now();
        state.served.clone()
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn load(&self) -> Result<Arc<Served>, String> {
        let start = Instant::now();
        let name = &self.model.name;
        let served = (self.model.load)().and_then(|loaded| Served::start(name.clone(), loaded))?;
        tracing::info!(model = name, ms = start.elapsed().as_millis() as u64, "loaded");
        let served = Arc::new(served);
        let mut state = self.state();
        state.served = Some(served.clone());
        state.used = Instant::now();
        Ok(served)
    }

    /// Lets the model answer what it has begun, and waits until it is gone.
    async fn unload(&self) {
        let Some(served) = self.state().served.take() else { return };
        let mut gone = served.gone();
        drop(served);
        // The model lets go of the other end.
        while gone.changed().await.is_ok() {}
        bevel_base::return_freed_memory();
        tracing::info!(model = self.model.name, "unloaded");
    }
}

impl Models {
    pub(crate) fn new(models: Vec<ModelToServe>, budget: Option<u64>) -> Self {
        let slots = models.into_iter().map(Slot::new).collect();
        Self { slots, budget, changing: tokio::sync::Mutex::new(()) }
    }

    /// Loads those that are there from the beginning: as many as memory holds, in their order.
    ///
    /// # Errors
    /// A model that cannot be loaded, and why. One larger than all memory for models cannot.
    pub(crate) fn load_first(&self) -> Result<(), (String, String)> {
        let budget = self.budget.unwrap_or(u64::MAX);
        for slot in &self.slots {
            let ModelToServe { name, memory, .. } = &slot.model;
            if *memory > budget {
                let problem = format!(
                    "it takes {memory} bytes with its keys and values, and there are {budget} for models"
                );
                return Err((name.clone(), problem));
            }
            if self.in_use().saturating_add(*memory) <= budget {
                slot.load().map_err(|problem| (name.clone(), problem))?;
            }
        }
        Ok(())
    }

    pub(crate) fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// A model by its name or that of one of its adapters, or the first one, with the adapters that this means. It
    /// may have to be loaded.
    pub(crate) async fn asked(self: &Arc<Self>, name: Option<&str>) -> Result<Asked, ApiError> {
        let found = name.and_then(|name| self.find(name));
        let (place, adapter) = match found {
            Some(found) => found,
            None => (self.place(name)?, None),
        };
        let slot = &self.slots[place];
        let adapters = adapter.as_ref().map_or_else(|| slot.adapters.usual(), |a| a.by_name());
        let served = self.get(Some(&slot.model.name)).await?;
        let name = adapter.map_or_else(|| served.name.clone(), |adapter| adapter.served.name);
        Ok(Asked { served, name, adapters })
    }

    /// The model of a name, and the adapter, where it is the name of one.
    pub(crate) fn find(&self, name: &str) -> Option<(usize, Option<ServedAdapter>)> {
        let model = self.slots.iter().position(|slot| slot.model.name == name);
        let adapter = || {
            let slots = self.slots.iter().enumerate();
            let mut found = slots.map(|(place, slot)| Some((place, slot.adapters.named(name)?)));
            found.find_map(|found| found).map(|(place, adapter)| (place, Some(adapter)))
        };
        model.map(|place| (place, None)).or_else(adapter)
    }

    /// A model by its name, or the first one. It may have to be loaded.
    pub(crate) async fn get(self: &Arc<Self>, name: Option<&str>) -> Result<Arc<Served>, ApiError> {
        let place = self.place(name)?;
        if let Some(served) = self.slots[place].used() {
            return Ok(served);
        }
        // A client that goes away does not stop it halfway.
        let models = self.clone();
        let load = tokio::spawn(async move { models.load(place).await });
        load.await.map_err(|error| ApiError::internal(error.to_string()))?
    }

    /// Unloads a model, once it has answered what it has begun.
    pub(crate) async fn unload(self: &Arc<Self>, name: Option<&str>) -> Result<(), ApiError> {
        let place = self.place(name)?;
        let models = self.clone();
        let unload = tokio::spawn(async move {
            let _turn = models.changing.lock().await;
            models.slots[place].unload().await;
        });
        unload.await.map_err(|error| ApiError::internal(error.to_string()))
    }

    /// Unloads those that nobody has asked for during this time. It does not end.
    pub(crate) async fn unload_idle(&self, after: Duration) {
        let mut often = tokio::time::interval((after / 10).max(Duration::from_millis(10)));
        loop {
            often.tick().await;
            let _turn = self.changing.lock().await;
            for slot in &self.slots {
                let is_idle = {
                    let mut state = slot.state();
                    // Others hold it while they are answered.
                    if state.served.as_ref().is_some_and(|served| Arc::strong_count(served) > 1) {
                        state.used = Instant::now();
                    }
                    state.used.elapsed() >= after
                };
                if is_idle {
                    slot.unload().await;
                }
            }
        }
    }

    async fn load(&self, place: usize) -> Result<Arc<Served>, ApiError> {
        let _turn = self.changing.lock().await;
        let slot = &self.slots[place];
        // Who came before may have wanted the same.
        if let Some(served) = slot.used() {
            return Ok(served);
        }
        while self
            .budget
            .is_some_and(|budget| self.in_use().saturating_add(slot.model.memory) > budget)
        {
            let loaded = self.slots.iter().filter(|other| other.loaded().is_some());
            let Some(oldest) = loaded.min_by_key(|other| other.state().used) else { break };
            oldest.unload().await;
        }
        let loaded = tokio::task::block_in_place(|| slot.load());
        loaded.map_err(|problem| {
            let problem = format!("`{}` cannot be loaded: {problem}", slot.model.name);
            ApiError::internal(problem).with_code("model_not_loaded")
        })
    }

    /// Bytes of the models that are loaded.
    fn in_use(&self) -> u64 {
        let loaded = self.slots.iter().filter(|slot| slot.loaded().is_some());
        loaded.map(|slot| slot.model.memory).sum()
    }

    /// Where a model is, by its name.
    pub(crate) fn place(&self, name: Option<&str>) -> Result<usize, ApiError> {
        let Some(name) = name else { return Ok(0) };
        self.slots.iter().position(|slot| slot.model.name == name).ok_or_else(|| {
            let names = |slot: &Slot| {
                let adapters = slot.adapters.all().into_iter().map(|adapter| adapter.served.name);
                std::iter::once(slot.model.name.clone()).chain(adapters).collect::<Vec<_>>()
            };
            let served: Vec<String> = self.slots.iter().flat_map(names).collect();
            let problem = format!("`{name}` is not served here; `{}` is", served.join("`, `"));
            ApiError { status: StatusCode::NOT_FOUND, ..ApiError::field("model", problem) }
                .with_code("model_not_found")
        })
    }
}
