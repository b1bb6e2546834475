//! The thread that an engine lives on. It takes requests, steps while there is something to do, and sleeps
//! while there is not.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bevel_engine::{Engine, EngineConfig, Metrics, Output, Refused, Request, RequestId};
use bevel_kernels::Cpu;
use bevel_model::Model;
use bevel_model::tokenizer::Tokenizer;
use tokio::sync::{mpsc, oneshot};

use crate::histogram::Histogram;

/// A model and its engine on their thread. The thread ends when the last handle is dropped.
#[derive(Debug)]
pub(crate) struct Worker {
    /// `None` once the thread is to end.
    commands: Option<Sender<Command>>,
    thread: Option<JoinHandle<()>>,
}

enum Command {
    Submit(Box<Submission>),
    Observe(oneshot::Sender<Observations>),
    /// Makes a mistake.
    #[cfg(test)]
    Panic,
}

struct Submission {
    /// The place of each comes back with its events.
    requests: Vec<Request>,
    events: mpsc::UnboundedSender<Event>,
    accepted: oneshot::Sender<Result<(), Refused>>,
}

/// News for a client.
#[derive(Debug)]
pub(crate) enum Event {
    /// Of the request that was submitted with this tag.
    Output(usize, Output),
    /// The engine failed: nothing more comes.
    Failed(String),
}

/// Why a request was not taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SubmitError {
    #[error(transparent)]
    Refused(#[from] Refused),
    #[error("the model's thread has ended")]
    Gone,
}

/// What a worker has seen so far.
#[derive(Clone, Debug, Default)]
pub(crate) struct Observations {
    pub(crate) engine: Metrics,
    /// From a request's arrival to its first token, in seconds.
    pub(crate) first_token: Histogram,
    /// Between two tokens of an answer.
    pub(crate) between_tokens: Histogram,
    /// From a request's arrival to its end.
    pub(crate) whole_request: Histogram,
    /// Requests that ended, by how.
    pub(crate) ended: HashMap<&'static str, u64>,
}

impl Worker {
    /// Starts a thread with an engine for `model`.
    ///
    /// # Errors
    /// Those of [`Engine::new`], and of starting a thread.
    pub(crate) fn start(
        model: Model,
        tokenizer: Arc<Tokenizer>,
        cpu: Arc<Cpu>,
        config: EngineConfig,
    ) -> Result<Self, String> {
        let (commands, received) = channel();
        let (ready, is_ready) = channel();
        let run = move || {
            let mut seen = Observations::default();
            loop {
                let mut engine = match Engine::new(&model, &tokenizer, &cpu, config.clone()) {
                    Ok(engine) => engine,
                    Err(error) => return ready.send(Err(error.to_string())).unwrap_or_default(),
                };
                let _ = ready.send(Ok(()));
                let served = catch_unwind(AssertUnwindSafe(|| {
                    let (engine, seen) = (&mut engine, &mut seen);
                    Loop { engine, active: HashMap::new(), seen }.run(&received);
                }));
                match served {
                    Ok(()) => return,
                    // Those it was working for have lost their answers; others go on with a new one.
                    Err(_) => tracing::error!(
                        "the engine failed by a mistake of its own; it is started anew"
                    ),
                }
            }
        };
        let thread = std::thread::Builder::new().name("engine".to_owned()).spawn(run);
        let thread = thread.map_err(|error| format!("cannot start a thread: {error}"))?;
        is_ready.recv().map_err(|_| "the engine's thread ended at once".to_owned())??;
        Ok(Self { commands: Some(commands), thread: Some(thread) })
    }

    /// Hands requests to the engine, all or none; what comes of them comes to `events`, until these are
    /// dropped.
    pub(crate) async fn submit(
        &self,
        requests: Vec<Request>,
        events: mpsc::UnboundedSender<Event>,
    ) -> Result<(), SubmitError> {
        let (accepted, is_accepted) = oneshot::channel();
        let submission = Submission { requests, events, accepted };
        self.send(Command::Submit(Box::new(submission)))?;
        Ok(is_accepted.await.map_err(|_| SubmitError::Gone)??)
    }

    /// What it has seen so far.
    pub(crate) async fn observe(&self) -> Result<Observations, SubmitError> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Observe(reply))?;
        answer.await.map_err(|_| SubmitError::Gone)
    }

    /// False once the thread has ended.
    pub(crate) fn is_alive(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    fn send(&self, command: Command) -> Result<(), SubmitError> {
        let commands = self.commands.as_ref().expect("only dropping takes it");
        commands.send(command).map_err(|_| SubmitError::Gone)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.commands = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Loop<'e, 'm> {
    engine: &'e mut Engine<'m>,
    active: HashMap<RequestId, Active>,
    seen: &'e mut Observations,
}

/// A request that somebody waits for.
struct Active {
    tag: usize,
    events: mpsc::UnboundedSender<Event>,
    arrived: Instant,
    /// When each answer last had a token.
    last_token: Vec<Option<Instant>>,
    /// Answers that have not ended.
    unfinished: u32,
}

impl Loop<'_, '_> {
    fn run(&mut self, commands: &Receiver<Command>) {
        loop {
            if self.engine.is_idle() {
                match commands.recv() {
                    Ok(command) => self.obey(command),
                    Err(_) => return,
                }
            }
            loop {
                match commands.try_recv() {
                    Ok(command) => self.obey(command),
                    Err(TryRecvError::Empty) => break,
                    // Nobody is left who could want anything.
                    Err(TryRecvError::Disconnected) => return,
                }
            }
            self.cancel_abandoned();
            match self.engine.step() {
                Ok(outputs) => outputs.into_iter().for_each(|output| self.pass_on(output)),
                Err(error) => self.fail(&error.to_string()),
            }
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Observe(reply) => {
                self.seen.engine = self.engine.metrics();
                let _ = reply.send(self.seen.clone());
            }
            Command::Submit(submission) => {
                let Submission { requests, events, accepted } = *submission;
                let _ = accepted.send(self.submit(requests, &events));
            }
            #[cfg(test)]
            Command::Panic => panic!("a test wants it"),
        }
    }

    fn submit(
        &mut self,
        requests: Vec<Request>,
        events: &mpsc::UnboundedSender<Event>,
    ) -> Result<(), Refused> {
        let mut taken = Vec::with_capacity(requests.len());
        for (tag, request) in requests.into_iter().enumerate() {
            let answers = request.answers;
            match self.engine.submit(request) {
                Ok(id) => taken.push((id, tag, answers)),
                Err(refused) => {
                    taken.into_iter().for_each(|(id, ..)| self.engine.cancel(id));
                    return Err(refused);
                }
            }
        }
        let arrived = Instant::now();
        for (id, tag, unfinished) in taken {
            let last_token = vec![None; unfinished as usize];
            let events = events.clone();
            self.active.insert(id, Active { tag, events, arrived, last_token, unfinished });
        }
        Ok(())
    }

    /// Requests whose client has gone.
    fn cancel_abandoned(&mut self) {
        let gone = self.active.extract_if(|_, active| active.events.is_closed());
        for (id, _) in gone {
            self.engine.cancel(id);
            *self.seen.ended.entry("abort").or_default() += 1;
        }
    }

    fn pass_on(&mut self, output: Output) {
        let Some(active) = self.active.get_mut(&output.request) else { return };
        let now = Instant::now();
        let since = |then: Instant| now.duration_since(then).as_secs_f64();
        if output.token.is_some() {
            match active.last_token[output.index as usize].replace(now) {
                None => self.seen.first_token.add(since(active.arrived)),
                Some(before) => self.seen.between_tokens.add(since(before)),
            }
        }
        if let Some(end) = &output.end {
            active.unfinished -= 1;
            self.seen.whole_request.add(since(active.arrived));
            *self.seen.ended.entry(crate::answer::end_name(&end.reason)).or_default() += 1;
        }
        let (id, finished) = (output.request, active.unfinished == 0);
        let _ = active.events.send(Event::Output(active.tag, output));
        if finished {
            self.active.remove(&id);
        }
    }

    /// The engine failed as a whole: nobody gets anything more.
    fn fail(&mut self, problem: &str) {
        tracing::error!(problem, "the engine failed; all requests end");
        for (id, active) in self.active.drain() {
            self.engine.cancel(id);
            let _ = active.events.send(Event::Failed(problem.to_owned()));
        }
        // Whatever is wrong, it shall not keep a core busy.
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use bevel_model::Checkpoint;

    use super::*;

    #[tokio::test]
    async fn an_engine_that_fails_is_started_anew() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/tiny-austen");
        let cpu = Arc::new(Cpu::new(2).unwrap());
        let model = Model::load(Checkpoint::open(&dir).unwrap(), &cpu, &mut |_| {}).unwrap();
        let tokenizer = Arc::new(model.checkpoint().tokenizer().unwrap());
        let config = EngineConfig::new(512, 4);
        let worker = Worker::start(model, tokenizer, cpu, config).unwrap();
        let request = |max_tokens| Request {
            max_tokens: Some(max_tokens),
            ignore_eos: true,
            ..Request::new(vec![5, 6, 7])
        };
        let (events, mut received) = mpsc::unbounded_channel();
        worker.submit(vec![request(500)], events).await.unwrap();
        assert!(received.recv().await.is_some());
        worker.send(Command::Panic).unwrap();
        // Who waits is not left waiting.
        while received.recv().await.is_some() {}
        assert!(worker.is_alive());
        let (events, mut received) = mpsc::unbounded_channel();
        worker.submit(vec![request(3)], events).await.unwrap();
        let mut tokens = 0;
        while let Some(event) = received.recv().await {
            let Event::Output(0, output) = event else { panic!("{event:?}") };
            tokens += usize::from(output.token.is_some());
        }
        assert_eq!(tokens, 3);
        let seen = worker.observe().await.unwrap();
        assert_eq!((seen.engine.running, seen.engine.blocks_used), (0, 0));
    }
}
